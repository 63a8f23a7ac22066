"""GPTQModel on the CPU, on given calibration tokens. Run inside its own environment:

    ENV/bin/python benchmarks/peers/gptqmodel_peer.py MODEL TOKENS.safetensors METHOD

The model is quantized in its own dtype and saved by the library. What it saved is loaded by the library
again, and the codes are dequantized in float32 by its own layers, as the scales of a checkpoint allow.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import GPTAQConfig, GPTQConfig
from measure import load
from peer import check_coverage, read_job, report, timed

GROUP_SIZE = 64


@dataclass(frozen=True)
class Method:
    bits: int
    corrected: bool = False
    """Errors of the layers before are made good (GPTAQ, arXiv 2504.02692)"""


METHODS = {
    "int4-gptq": Method(4),
    "int4-gptaq": Method(4, corrected=True),
    "int3-gptq": Method(3),
    "int3-gptaq": Method(3, corrected=True),
    "int2-gptq": Method(2),
    "int2-gptaq": Method(2, corrected=True),
}


@torch.no_grad()
def written_into(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """`model` in float32 with the numbers of a GPTQ checkpoint in place of its weights."""
    model.float()
    made = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH).model
    for name, module in made.named_modules():
        if isinstance(module, TorchLinear):
            module.scales.data = module.scales.data.float()
            linear = model.get_submodule(name)
            linear.weight.copy_(module.dequantize_weight().T)
            linear.is_quantized = True
    return model


def main() -> None:
    job = read_job(__doc__, METHODS)
    method = METHODS[job.method]
    config = GPTQConfig(
        bits=method.bits, group_size=GROUP_SIZE, gptaq=GPTAQConfig() if method.corrected else None
    )
    model = GPTQModel.load(job.model, config, device="cpu")
    windows = [
        {"input_ids": window.tolist(), "attention_mask": [1] * len(window)}
        for window in job.calibration
    ]
    _, cost = timed(lambda: model.quantize(windows, batch_size=8))
    out = Path(job.out or tempfile.mkdtemp())
    model.save(str(out))
    quantized = written_into(load(job.model, "auto"), out)
    if not job.out:
        shutil.rmtree(out)
    check_coverage(quantized, lambda module: hasattr(module, "is_quantized"))
    report(job, "gptqmodel", "gptqmodel", cost, quantized)


if __name__ == "__main__":
    # with two cores it starts one worker, and refuses to load with fewer than two
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    main()
