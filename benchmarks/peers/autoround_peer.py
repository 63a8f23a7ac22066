"""AutoRound, on the GPU where there is one, on given calibration tokens. Run inside its own environment:

    ENV/bin/python benchmarks/peers/autoround_peer.py MODEL TOKENS.safetensors METHOD

The model is quantized in its own dtype; AutoRound leaves weights that are quantized and
dequantized in that dtype, beside their scales. The codes are read back from them and dequantized
again in float32, as a checkpoint's are.

AutoRound compiles its tuning step with torch.compile by default, so the first run pays for it and
later ones find it in the Inductor cache: set TORCHINDUCTOR_CACHE_DIR to a new folder to time a
first run.
"""

import copy
from dataclasses import dataclass

import torch
from auto_round import AutoRound
from measure import load
from peer import check_coverage, read_job, report, timed
from transformers import AutoTokenizer

GROUP_SIZE = 64
BATCH = 8


@dataclass(frozen=True)
class Tuning:
    iters: int
    lr: float | None  # None: the library's own, 1 / iters
    bits: int = 4


METHODS = {
    "int4": Tuning(200, None),
    "int3": Tuning(200, None, bits=3),
    "int2": Tuning(200, None, bits=2),
    "int4-light": Tuning(50, 5e-3),
    "int3-light": Tuning(50, 5e-3, bits=3),
    "int2-light": Tuning(50, 5e-3, bits=2),
}


@torch.no_grad()
def dequantize_in_float32(model: torch.nn.Module) -> None:
    """Replace each quantized weight by code * scale in float32 (symmetric: no zero point)."""
    model.float()
    for module in model.modules():
        if hasattr(module, "scale"):
            groups = module.weight.unflatten(1, (-1, GROUP_SIZE))
            scale = module.scale.float().unsqueeze(-1)
            module.weight.copy_(((groups / scale).round() * scale).flatten(1))


def main() -> None:
    job = read_job(__doc__, METHODS)
    tuning = METHODS[job.method]
    model = load(job.model, "auto")
    count, length = job.calibration.shape
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme="W4A16",
        bits=tuning.bits,
        group_size=GROUP_SIZE,
        sym=True,
        iters=tuning.iters,
        lr=tuning.lr,
        dataset=list(job.calibration.split(BATCH)),
        nsamples=count,
        seqlen=length,
        batch_size=BATCH,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    (model, _), cost = timed(rounder.quantize)
    check_coverage(model, lambda module: hasattr(module, "scale"))
    quantized = copy.deepcopy(model).cpu()
    if job.out:
        rounder.save_quantized(job.out, format="auto_round")  # packs `model` in place
    dequantize_in_float32(quantized)
    report(job, "auto-round", "auto-round", cost, quantized, iters=tuning.iters)


if __name__ == "__main__":
    main()
