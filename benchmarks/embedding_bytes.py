"""What `--embedding` saves on Llama-3.2-3B's shape with random weights: bytes on disk and in the GPU's
memory, as shares of the 16-bit model's, and the speed of decoding.

    python -m benchmarks.embedding_bytes --work DIR --out RESULT.json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.guide_shape import random_llama

from tinier.benchmark import Workload, bench, environment
from tinier.checkpoint import Checkpoint
from tinier.device import release_memory
from tinier.engine.decoder import load_decoder
from tinier.quantization import QuantizePlan, quantize

VARIANTS = {
    "fp8": QuantizePlan(preset="fp8"),
    "fp8, FP8 head": QuantizePlan(preset="fp8", head="fp8"),
    "fp8, FP8 embedding": QuantizePlan(preset="fp8", embedding="fp8"),
    "fp8, INT8 embedding": QuantizePlan(preset="fp8", embedding="int8"),
    "int4": QuantizePlan(preset="int4"),
    "int4, FP8 head": QuantizePlan(preset="int4", head="fp8"),
    "int4, INT8 embedding": QuantizePlan(preset="int4", embedding="int8"),
    "int4, INT4 embedding": QuantizePlan(preset="int4", embedding="int4"),
}


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    decoder = load_decoder(checkpoint, device=torch.device("cuda"))
    found = {"disk_bytes": checkpoint.weight_bytes, "memory_bytes": decoder.weight_bytes}
    del decoder
    release_memory()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoints go, 35 GB")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = random_llama(arguments.work, 28)
    models = {"bf16": base}
    for name, plan in VARIANTS.items():
        folder = arguments.work / name.replace(", ", "-").replace(" ", "-")
        models[name] = quantize(base, plan, folder, device="cuda")
    found: dict[str, dict[str, Any]] = {name: dict(sizes(model)) for name, model in models.items()}
    for name, values in found.items():
        for key in ("disk_bytes", "memory_bytes"):
            values[key.replace("bytes", "percent")] = 100 * values[key] / found["bf16"][key]
        print(name, values, flush=True)
    for batch in (1, 64):
        workload = Workload(concurrency=batch, input_length=128, output_length=128)
        results = bench(models, workload, base="bf16", repeats=5, seed=0, device="cuda")
        for name, result in results.items():
            found[name][f"batch_{batch}"] = asdict(result)
            tokens, ratio = result.output_tokens_per_s, result.ratio_to_base
            print(
                batch, name, tokens.median, ratio and ratio.median, result.itl_ms.median, flush=True
            )
    record = {
        "model": "Llama-3.2-3B's shape, random weights",
        "environment": environment(torch.device("cuda")),
        "variants": found,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
