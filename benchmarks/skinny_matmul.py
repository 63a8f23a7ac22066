"""Tilings of the matrix product for few tokens, on Llama-3.2-3B's layers, random weights, one GPU.

For each format, layer and number of tokens: microseconds of the tiling that `tiling_for` chooses and of the
best few of a sweep, with the share of the measured copy bandwidth at which the weight was read. Copies of
the weight that do not fit the L2 cache together are multiplied one after the other in a CUDA graph.

    python -m benchmarks.skinny_matmul --out RESULT.json [--kinds bf16 fp8 int4] [--tokens 1 64]
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine_speed import ceilings

from tinier.benchmark import environment
from tinier.kernels import skinny
from tinier.kernels.skinny import Tiling, Weight

LAYERS = {
    "qkv": (5120, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192),
    "head": (128_256, 3072),
}  # fmt: skip
BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
BEST = 5


def random_weight(kind: str, rows: int, columns: int) -> Weight:
    shape = (rows, columns)
    if kind == "int4":
        codes = torch.randint(-8, 8, shape, device="cuda", dtype=torch.int8)
        scale = torch.rand(columns // 128, rows, device="cuda").bfloat16()
        return Weight(skinny.pack_int4(codes), scale, None, shape, 128)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if kind == "bf16":
        return Weight(weight, None, None, shape)
    return Weight(weight.to(torch.float8_e4m3fn), torch.rand(rows, device="cuda"), None, shape)


def tilings(kind: str, rows: int, tokens: int) -> Iterator[Tiling]:
    if kind == "int4":
        blocks, widths = ([(64, 4), (128, 4)] if tokens <= 16 else [(128, 8), (256, 8)]), [128]
    else:
        blocks, widths = [(64, 4)], [64, 128, 256] if kind == "bf16" else [128, 256, 512]
    for (block, warps), width, splits, stages, ahead in itertools.product(
        blocks, widths, range(1, 13), (2, 3, 4, 6), (0, 512)
    ):
        fits = kind == "int4" or width * BYTES[kind] * 64 * stages < 120_000
        if fits and (splits == 1 or 96 <= -(-rows // block) * splits <= 600):
            yield Tiling(block, width, splits, stages, warps, ahead)


def microseconds(
    x: torch.Tensor, scale: torch.Tensor | None, weights: list[Weight], tiling: Tiling
) -> float:
    skinny.matmul(x, scale, weights[0], tiling)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            skinny.matmul(x, scale, weight, tiling)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(weights))
    return statistics.median(times)


def measure(kind: str, layer: str, tokens: int, bandwidth: float) -> dict[str, Any]:
    rows, columns = LAYERS[layer]
    size = rows * columns * BYTES[kind]
    weights = [random_weight(kind, rows, columns) for _ in range(3 + int(150e6 / size))]
    x = torch.randn(tokens, columns, device="cuda")
    fp8 = kind == "fp8"
    x = x.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    scale = torch.rand(tokens, 1, device="cuda") if fp8 else None

    def row(tiling: Tiling) -> dict[str, Any]:
        took = microseconds(x, scale, weights, tiling)
        share = size / took / bandwidth * 1e6
        return {"microseconds": took, "share": share, "tiling": tiling._asdict()}

    swept = sorted((row(t) for t in tilings(kind, rows, tokens)), key=lambda r: r["microseconds"])
    return {"chosen": row(skinny.tiling_for(weights[0], tokens)), "best": swept[:BEST]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--kinds", nargs="+", default=list(BYTES), choices=list(BYTES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64])
    arguments = parser.parse_args()
    limits = ceilings()
    results: dict[str, Any] = {}
    for kind, layer, tokens in itertools.product(arguments.kinds, LAYERS, arguments.tokens):
        if kind == "int4" and layer == "head":
            continue
        name = f"{kind} {layer} {tokens}"
        results[name] = measure(kind, layer, tokens, limits["copy_bytes_per_second"])
        for label, found in (
            ("chosen", results[name]["chosen"]),
            ("best", results[name]["best"][0]),
        ):
            print(f"{name:18} {label:6} {found['microseconds']:6.1f} us {found['share']:4.0%}")
        torch.cuda.empty_cache()
    record = {
        "environment": environment(torch.device("cuda")), "ceilings": limits, "results": results,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
