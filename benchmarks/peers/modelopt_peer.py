"""NVIDIA ModelOpt on the CPU, on given calibration tokens. Run inside its own environment:

    ENV/bin/python benchmarks/peers/modelopt_peer.py MODEL TOKENS.safetensors METHOD

The model is quantized in its own dtype. Its weights and the library's ranges (amax, pre-quant
scales) are then upcast, and the library's fake quantization, which computes in float32 whatever
the dtype, runs in each forward pass.
"""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from measure import load
from modelopt.torch.export import export_hf_checkpoint
from peer import check_coverage, read_job, report, timed

GROUP_SIZE = 64
BATCH = 8


def int4_awq() -> dict[str, Any]:
    """INT4_AWQ_CFG with groups of GROUP_SIZE in place of 128."""
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = GROUP_SIZE
    return config


CONFIGS = {
    "fp8-static": mtq.FP8_DEFAULT_CFG,
    "int8-sq": mtq.INT8_SMOOTHQUANT_CFG,
    "int4-awq": int4_awq(),
}


def main() -> None:
    job = read_job(__doc__, CONFIGS)
    model = load(job.model, "auto")

    @torch.no_grad()
    def calibrate(model: torch.nn.Module) -> None:
        for tokens in job.calibration.split(BATCH):
            model(input_ids=tokens, use_cache=False)

    model, cost = timed(lambda: mtq.quantize(model, CONFIGS[job.method], calibrate))
    check_coverage(model, lambda module: module.weight_quantizer.is_enabled)
    if job.out:
        export_hf_checkpoint(copy.deepcopy(model), export_dir=job.out)
    report(job, "modelopt", "nvidia-modelopt", cost, model)


if __name__ == "__main__":
    main()
