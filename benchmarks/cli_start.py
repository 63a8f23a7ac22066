"""Seconds from typing `tinier generate smollm2-135m` to its first character, and to its end, on a CPU.

Several versions of the source by turns, each a folder that is put on PYTHONPATH (a git worktree's src); the
first is the baseline. Everything is in the page cache and compiled: each is started once before.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.cli_start --sources /tmp/before/src src [--rounds 7] --out RESULT.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tinier.benchmark import environment

COMMAND = ("generate", "smollm2-135m", "--prompt", "The capital of France is", "--max-tokens", "8")


def start(source: Path) -> tuple[float, float]:
    """Seconds to the first character and to the end of a new process."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tinier", *COMMAND], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(source.absolute())},
    )  # fmt: skip
    assert process.stdout is not None
    if not process.stdout.read(1):
        raise RuntimeError(f"{source} wrote nothing")
    first = time.perf_counter() - begun
    process.stdout.read()
    process.wait()
    return first, time.perf_counter() - begun


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    samples: dict[Path, list[tuple[float, float]]] = {path: [] for path in arguments.sources}
    for source in samples:
        start(source)
    for _ in range(arguments.rounds):
        for source, found in samples.items():
            found.append(start(source))
    result: dict[str, Any] = {
        "command": " ".join(("tinier", *COMMAND)),
        "environment": environment(torch.device("cpu")),
        "seconds": {
            str(source): {
                "to_first_character": spread([first for first, _ in found]),
                "to_the_end": spread([end for _, end in found]),
            }
            for source, found in samples.items()
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for source, figures in result["seconds"].items():
        first, end = (figures[name]["median"] for name in ("to_first_character", "to_the_end"))
        print(f"{source}: first character {first:.2f} s, end {end:.2f} s")


if __name__ == "__main__":
    main()
