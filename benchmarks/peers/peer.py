"""What the peer scripts share: arguments, the clock around quantization, the report."""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from measure import DTYPES, measure
from safetensors.torch import load_file


@dataclass(frozen=True)
class Job:
    """One command line, its tokens read."""

    model: str
    method: str
    calibration: torch.Tensor
    evaluation: torch.Tensor
    dtype: torch.dtype
    out: str | None


@dataclass(frozen=True)
class Cost:
    """What one call took; CPU seconds count user and system time of every thread and child."""

    seconds: float
    cpu_seconds: float


def read_job(description: str | None, methods: Iterable[str]) -> Job:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the 16-bit model")
    parser.add_argument("tokens", help="safetensors: int64 `calibration` and `evaluation`")
    parser.add_argument("method", choices=list(methods))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the evaluation")
    parser.add_argument("--out", help="also save the library's own checkpoint here")
    arguments = parser.parse_args()
    tokens = load_file(arguments.tokens)
    return Job(
        model=arguments.model,
        method=arguments.method,
        calibration=tokens["calibration"],
        evaluation=tokens["evaluation"],
        dtype=DTYPES[arguments.dtype],
        out=arguments.out,
    )


def timed(call: Callable[[], Any]) -> tuple[Any, Cost]:
    cpu, wall = _cpu_seconds(), time.perf_counter()
    result = call()
    return result, Cost(time.perf_counter() - wall, _cpu_seconds() - cpu)


def check_coverage(model: torch.nn.Module, quantized: Callable[[torch.nn.Module], bool]) -> None:
    """Raise unless every linear of the decoder layers is quantized and no other one is."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and quantized(module) != (".layers." in name):
            raise RuntimeError(f"{name}: quantized is {quantized(module)}")


def report(job: Job, peer: str, package: str, cost: Cost, model: Any, **extra: Any) -> None:
    """Measure the quantized model in the job's dtype and print the line of JSON."""
    if model.dtype != job.dtype:  # else leave ranges that the library keeps in float32
        model.to(job.dtype)
    quality = measure(model, job.model, job.evaluation, job.dtype)
    if not quality["kl"] > 0:
        raise RuntimeError(f"{job.method}: the model equals its base; nothing was quantized")
    line = {
        "peer": peer,
        "version": version(package),
        "method": job.method,
        "seconds": round(cost.seconds, 3),
        "cpu_seconds": round(cost.cpu_seconds, 3),
        **quality,
        **extra,
    }
    print(json.dumps(line), flush=True)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
