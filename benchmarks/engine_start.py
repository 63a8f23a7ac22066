"""Seconds from the start of a process to its first token: Llama-3.2-3B's shape from local disk, on one GPU.

Writes the checkpoint (random weights, bf16, and FP8 made of it) to a folder, then starts processes that
open it, start the engine and generate one token; the first of each finds no compiled kernel.

    python -m benchmarks.engine_start FOLDER --out RESULT.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.guide_shape import write_random_llama

from tinier.benchmark import environment
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize

ONE_TOKEN = """
import sys, time
begun = time.perf_counter()
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model
imported = time.perf_counter()
engine = Engine(open_model(sys.argv[1]), EngineConfig(max_batch_size=64, max_seq_len=4096))
loaded = time.perf_counter()
engine.generate([list(range(100, 356))], SamplingParams(max_tokens=1))
print(imported - begun, loaded - imported, time.perf_counter() - loaded)
"""
PARTS = ("imports", "engine", "token")


def write_models(folder: Path) -> list[Path]:
    bf16 = folder / "bf16"
    if not bf16.exists():
        write_random_llama(bf16)
    fp8 = folder / "fp8"
    if not fp8.exists():
        quantize(open_model(bf16), QuantizePlan(preset="fp8"), fp8, device="cuda")
    return [bf16, fp8]


def first_token(model: Path, cache: Path) -> dict[str, float]:
    """Seconds of a new process, whole and by its parts: Python starts and ends beside them. cache: where
    Triton keeps compiled kernels."""
    begun = time.perf_counter()
    environ = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    process = [sys.executable, "-c", ONE_TOKEN, str(model)]
    said = subprocess.run(process, check=True, env=environ, stdout=subprocess.PIPE, text=True)
    whole = time.perf_counter() - begun
    return {"whole": whole, **dict(zip(PARTS, map(float, said.stdout.split()), strict=True))}


def drop_page_cache() -> bool:
    """Make the next reads come from the disk; False: not allowed here."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoints go, 10 GB")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    cache = arguments.folder / "triton"
    record: dict[str, Any] = {
        "model": "Llama-3.2-3B's shape, random weights",
        "environment": environment(torch.device("cuda")),
    }
    for model in write_models(arguments.folder):
        shutil.rmtree(cache, ignore_errors=True)
        first = first_token(model, cache)
        from_disk = drop_page_cache()
        cold = first_token(model, cache)
        again = [first_token(model, cache) for _ in range(arguments.repeats)]
        whole = [one["whole"] for one in again]
        record[model.name] = {
            "nothing_compiled_seconds": first,
            "page_cache_dropped": from_disk,
            "compiled_seconds": cold,
            "compiled_and_in_page_cache_seconds": statistics.median(whole),
            "spread_seconds": max(whole) - min(whole),
            "runs": again,
        }
        print(model.name, record[model.name], flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
