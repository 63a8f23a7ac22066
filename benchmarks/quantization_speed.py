"""Time and peak memory of each preset on Llama-3.2-3B's shape with random weights, on one GPU.

Llama-3.2-3B's weights are gated; its shape is not. Quality of random weights means nothing and is not
reported. The text is in byte tokens; where it is too short for the windows that are asked for, the result
says how many there were. --ways: `both` weighs tokens and corrects drift (benchmarks/weighting.py).

    python -m benchmarks.quantization_speed --work DIR --out RESULT.json [--layers 28]
        [--presets fp8 int4-gptq int4-awq int4-best] [--ways plain both] [--windows 128] [--length 2048]
        [--text builtin]
"""

import argparse
import json
import shutil
import statistics
import time
from itertools import product
from pathlib import Path

import torch
from benchmarks.guide_shape import random_llama
from benchmarks.weighting import WAYS

from tinier import progress
from tinier.benchmark import environment
from tinier.quantization import QuantizePlan, quantize
from tinier.schemes import PRESETS
from tinier.text import load_documents, token_windows
from tinier.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--presets", nargs="+", default=["fp8", "int4-gptq", "int4-awq", "int4-best"]
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["plain"])
    parser.add_argument("--text", default="builtin")
    arguments = parser.parse_args()
    progress.enable()
    source = random_llama(arguments.work, arguments.layers)
    documents = load_documents(arguments.text)
    windows = token_windows(
        load_tokenizer(source), documents, length=arguments.length, count=arguments.windows
    )
    result: dict[str, object] = {
        "model": "Llama-3.2-3B's shape, random weights",
        "layers": arguments.layers,
        "windows": len(windows),
        "length": arguments.length,
        "environment": environment(torch.device("cuda")),
        "presets": {},
    }
    for preset, way in product(arguments.presets, arguments.ways):
        grouped = PRESETS[preset].scheme.weights.granularity == "group"
        plan = QuantizePlan(
            preset=preset,
            group_size=128 if grouped else None,
            windows=arguments.windows,
            length=arguments.length,
            **WAYS[way],
        )
        seconds, peaks = [], []
        for _ in range(arguments.repeats):
            out = arguments.work / "quantized"
            shutil.rmtree(out, ignore_errors=True)
            started = time.monotonic()
            made = quantize(source, plan, out, text=documents, device="cuda")
            seconds.append(time.monotonic() - started)
            assert made.manifest is not None
            peaks.append(made.manifest.peak_memory_bytes)
        figures = {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "peak_gpu_bytes": max(peaks),
            "warnings": len(made.manifest.warnings),
        }
        result["presets"][preset if way == "plain" else f"{preset}, {way}"] = figures  # type: ignore[index]
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(preset, way, figures, flush=True)


if __name__ == "__main__":
    main()
