"""Distillation of Llama-3.2-3B's shape on one GPU: 28 layers teach 21, windows of 2,048 tokens.

Random weights: Llama-3.2-3B's are gated, its shape is not; the loss means nothing and is not reported.
Share of peak: (6 FLOP a student parameter and token + 2 a teacher parameter) / the time / what a large
bf16 matrix product reaches in the same run.

    python -m benchmarks.distillation_speed --work DIR --out RESULT.json [--steps 3]
        [--settings selective full selective+compile] [--micro-batch 4] [--grid int4 --drop 0]

--grid PRESET trains on that preset's grid; --drop: layers that the student lacks.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.guide_shape import random_llama

from tinier import progress
from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import matmul_flops, release_memory
from tinier.distillation import DistillPlan, distill
from tinier.distillation.plan import training_flops
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan
from tinier.text import load_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, help="default: tinier's own")
    parser.add_argument("--grid", help="preset")
    parser.add_argument("--drop", type=int, help="layers; default a quarter")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--settings", nargs="+", default=["selective+compile"])
    arguments = parser.parse_args()
    progress.enable()
    teacher = random_llama(arguments.work, arguments.layers)
    count = arguments.layers // 4 if arguments.drop is None else arguments.drop
    last = arguments.layers - 1
    student = teacher
    if count:
        student_folder = arguments.work / "student"
        shutil.rmtree(student_folder, ignore_errors=True)
        student = prune(
            teacher,
            PrunePlan(drop_layers=tuple(range(last - count, last)), refit=False),
            student_folder,
        )
    matmul_tflops = matmul_flops(torch.device("cuda")) / 1e12
    result: dict[str, Any] = {
        "model": "Llama-3.2-3B's shape, random weights",
        "teacher_layers": arguments.layers,
        "student_layers": arguments.layers - count,
        "grid": arguments.grid,
        "global_batch": arguments.batch,
        "length": arguments.length,
        "steps": arguments.steps,
        "environment": environment(torch.device("cuda")),
        "matmul_tflops": matmul_tflops,
    }
    for setting in arguments.settings:
        figures = timed(setting, student, teacher, arguments)
        figures["share_of_matmul_peak"] = figures["tflops"] / matmul_tflops
        result[setting] = figures
        print(setting, figures, flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def timed(
    setting: str, student: Checkpoint, teacher: Checkpoint, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Distil for a few steps. setting: what is computed again, with `+compile` for compiled layers."""
    checkpointing, _, compiled = setting.partition("+")
    grid = None
    if arguments.grid is not None:
        grid = QuantizePlan(preset=arguments.grid, windows=8, length=512)
    plan = DistillPlan(
        steps=arguments.steps, batch=arguments.batch, micro_batch=arguments.micro_batch,
        length=arguments.length, warmup_steps=1, lr=1e-6, min_lr=1e-6, eval_every=10**9,
        checkpointing=checkpointing, compile=bool(compiled), save_seconds=1e9, quantize=grid,  # type: ignore[arg-type]
    )  # fmt: skip
    out = arguments.work / "distilled"
    for folder in (out, out.with_name("distilled-last")):
        shutil.rmtree(folder, ignore_errors=True)
    release_memory()
    documents = load_documents("builtin")
    started = time.monotonic()
    made = distill(student, teacher, plan, out, text=documents, heldout=documents, device="cuda")
    assert made.manifest is not None
    rates = made.manifest.measures["all_tokens_per_s"][1:]  # the first step warms up
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_spread": [min(rates), max(rates)],
        "tflops": training_flops(student, teacher) * statistics.median(rates) / 1e12,
        "peak_gpu_bytes": made.manifest.peak_memory_bytes,
        "micro_batch": made.manifest.measures["micro_batch"],
        "command_seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    main()
