"""A decoding step in one kernel (gpu_decode.cu) against the same step operator by operator, on one GPU.

    python -m benchmarks.decode_kernel --out RESULT.json [--models bf16 fp8 int4] [--batches 1 2 4]
        [--context 450] [--layers N] [--trace]

Llama-3.2-3B's shape with random weights, or another one's (qwen3-0.6b:bf16; architectures.py). For each
model and batch: how far the logits of the two are apart (as a share of their size, two layers), and
milliseconds of a captured step, by turns. --trace: instead, microseconds of each phase of a layer as one
block sees them, by its clock.
"""

import argparse
import ctypes
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from benchmarks import architectures, engine_speed
from torch import Tensor

from tinier.benchmark import environment
from tinier.engine import SamplingParams
from tinier.engine.request import Request
from tinier.engine.runner import Runner
from tinier.engine.scheduler import Chunk
from tinier.kernels import cuda

BLOCK_SIZE, BLOCKS = 16, 600
PHASES = (
    "norm", "q k v", "attend", "prepare", "out", "norm", "gate up", "prepare", "down",
)  # fmt: skip
INSIDE = (
    "turn", "own", "keys", "lanes", "together", "warps", "join",
)  # fmt: skip
CLOCK = 1980.0  # cycles of a microsecond, of an H100 under this load


def runner_of(model: str, layers: int | None) -> Runner:
    """With a cache that is full of numbers."""
    shape, _, form = model.rpartition(":")
    if shape:
        decoder = architectures.random_decoder(shape, form, layers)
    else:
        decoder = engine_speed.random_decoder(model, layers)
    runner = Runner(decoder, BLOCKS, BLOCK_SIZE, 4, 4096, 64, in_one_kernel=True)
    assert runner._whole is not None, "this GPU or model has no step in one kernel"
    fill_caches(runner, 40)
    return runner


def fill_caches(runner: Runner, times: float) -> None:
    """Draw all keys and values; times: so much, where they are codes."""
    for cache in runner._caches:
        for tensor in (cache.keys, cache.values):
            drawn = torch.randn(tensor.shape, device=tensor.device)
            tensor.copy_((drawn * times).to(tensor.dtype) if tensor.itemsize == 1 else drawn)


def inputs_of(runner: Runner, contexts: list[int]) -> Tensor:
    """What a step reads for a new token of each of some sequences that have so many with it."""
    free = torch.randperm(runner._num_blocks).tolist()
    vocab, chunks = runner.decoder.geometry.vocab, []
    for seat, context in enumerate(contexts):
        tokens = torch.randint(0, vocab, (context,)).tolist()
        request = Request(seat + 1, tokens, SamplingParams(), 0.0, runner.width)
        request.seat = seat
        for _ in range(-(-context // runner._block_size)):
            request.add_block(free.pop())
        chunks.append(Chunk(request, context - 1, 1))
    return runner._inputs(chunks, len(chunks), len(chunks)).to(runner.decoder.device)


def apart(model: str, contexts: list[int]) -> float:
    """How far the two steps' logits are apart, as a share of their size."""
    runner = runner_of(model, 2)
    whole, inputs, ones = runner._whole, inputs_of(runner, contexts), [1] * len(contexts)
    assert whole is not None
    ours = runner._compute(inputs, ones, max(contexts)).logits.float()
    again = runner._compute(inputs, ones, max(contexts)).logits.float()
    assert torch.equal(ours, again)
    runner._whole = None
    theirs = runner._compute(inputs, ones, max(contexts)).logits.float()
    return float((ours - theirs).norm() / theirs.norm())


def milliseconds(runner: Runner, contexts: list[int], repeats: int = 5) -> dict[str, list[float]]:
    """Of a captured step, each number the median of 20 replays, by turns."""
    whole, inputs, ones = runner._whole, inputs_of(runner, contexts), [1] * len(contexts)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    kept = []
    for name, step in (("operators", None), ("one kernel", whole)):
        runner._whole = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            runner._compute(inputs, ones, max(contexts))
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            kept.append(runner._compute(inputs, ones, max(contexts)))
    runner._whole = whole

    def replayed(graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            times[name].append(statistics.median(replayed(graph) for _ in range(20)))
    return times


def traced(model: str, contexts: list[int]) -> dict[str, Any]:
    """Microseconds of a layer's phases, medians over layers, and inside attention."""
    layers, runs = 8, 3
    runner = runner_of(model, layers)
    assert runner._whole is not None
    runner._whole._sizes["TRACE"] = 1  # the block whose clock is read: one of those with most rows
    inputs = inputs_of(runner, contexts)
    for _ in range(runs):
        runner._compute(inputs, [1] * len(contexts), max(contexts))
    torch.cuda.synchronize()
    kernel = runner._whole._kernels[len(contexts)][0]

    def numbers(name: bytes, count: int) -> list[int]:
        at, size, host = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_longlong * count)()
        cuda.check_driver(
            cuda.driver().cuModuleGetGlobal_v2(
                ctypes.byref(at), ctypes.byref(size), kernel._module, name
            )
        )
        cuda.check_driver(cuda.driver().cuMemcpyDtoH_v2(host, at, ctypes.c_size_t(8 * count)))
        return list(host)

    each = len(PHASES)
    marks = numbers(b"trace", layers * each + 1)
    spans = [(after - before) / CLOCK for before, after in itertools.pairwise(marks)]
    rows = [spans[layer * each : (layer + 1) * each] for layer in range(2, layers)]
    inside = numbers(b"inside", len(INSIDE) + 1)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return {
        "phases": [f"{name} {span:.1f}" for name, span in zip(PHASES, medians, strict=True)],
        "layer": sum(medians),
        "attention": {
            name: (after - before) / CLOCK / layers / runs
            for name, before, after in zip(INSIDE, inside, inside[1:], strict=False)
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--models", nargs="+", default=["bf16", "fp8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--context", type=int, default=450)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record: dict[str, Any] = {"environment": environment(torch.device("cuda")), "rows": []}
    for model in arguments.models:
        runner = None if arguments.trace else runner_of(model, arguments.layers)
        for batch in arguments.batches:
            contexts, row = [arguments.context] * batch, {"model": model, "batch": batch}
            if runner is None:
                row |= traced(model, contexts)
            else:
                times = milliseconds(runner, contexts)
                row["milliseconds"] = times
                row["ratio"] = statistics.median(
                    a / b for a, b in zip(times["operators"], times["one kernel"], strict=True)
                )
                row["apart"] = apart(model, [2000, 300, 64, 1][:batch])
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
