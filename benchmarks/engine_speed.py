"""Speed of the engine on Llama-3.2-3B's shape with random weights, on one GPU.

Decode: tokens/s with 1, 4 and 64 requests in step, after a prompt of 384 tokens. `share` is of the
limit: the bytes that a step must read (weights with the head, and the cached keys and values) at the
copy bandwidth measured in the same run. Prefill: 8 prompts of 2,048 tokens; `share` is of the bf16
matrix product's peak measured in the same run. Requests/s: 512 tokens in, 128 out, so many in flight.
`idle`: share of the time in which no kernel runs, decoding 64 requests, from the profiler's records.

    python -m benchmarks.engine_speed --out RESULT.json [--models bf16 fp8 fp8-kv int8 int4 bf16-21 fp8-21]
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.guide_shape import SHAPE

from tinier.benchmark import environment
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.engine.decoder import Decoder, Layer
from tinier.engine.rope import Rope
from tinier.families import Geometry, LayerKind
from tinier.kernels import Linear, StoredLinear, make_linear, make_table
from tinier.numerics import Quantized, cast_e4m3
from tinier.schemes import PRESETS, Grid, Layout, Scheme

KV8 = Grid(kind="float", bits=8, granularity="tensor")


def geometry(layers: int) -> Geometry:
    return Geometry(
        layers=layers, hidden=3072, intermediate=8192, heads=24, kv_heads=8, head_dim=128, turning=128,
        vocab=128_256, max_positions=131_072, norm_eps=1e-5, tied_head=True, qkv_bias=False,
        out_bias=False, mlp_bias=False, hidden_in_heads=True, kinds=(LayerKind(),) * layers,
    )  # fmt: skip


def random_linear(rows: int, columns: int, scheme: Scheme | None) -> Linear:
    """A random weight as a checkpoint of this scheme would have it."""
    size = 0.5 * columns**-0.5
    if scheme is None:
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * size
        return make_linear([StoredLinear(weight, None)], torch.bfloat16)
    if scheme.weights.kind == "float":
        codes = cast_e4m3(torch.randn(rows, columns, device="cuda") * 100)
        scale = torch.full((rows, 1), size / 100, device="cuda")
    else:
        half = 1 << (scheme.weights.bits - 1)
        codes = torch.randint(-half, half, (rows, columns), device="cuda", dtype=torch.int8)
        groups = columns // (scheme.weights.group_size or columns)
        scale = torch.full((rows, groups), 2 * size / half, device="cuda", dtype=torch.bfloat16)
    return make_linear([StoredLinear(Quantized(codes, scale), None, scheme)], torch.bfloat16)


def random_decoder(name: str, layers: int | None = None) -> Decoder:
    """`bf16`, `fp8`, `int8` or `int4` (with an FP8 head), `-kv` with an FP8 cache, `-21` of 21 layers.
    layers: as many instead."""
    kind, *options = name.split("-")
    g = geometry(layers or (21 if "21" in options else 28))
    scheme, head_scheme = None, None
    if kind != "bf16":
        head_scheme = PRESETS["fp8"].scheme
        scheme = head_scheme
    if kind == "int4":
        grid = Grid(kind="int", bits=4, granularity="group", group_size=128)
        scheme = Scheme(weights=grid)
    if kind == "int8":
        scheme = PRESETS["int8-sq"].scheme
    torch.manual_seed(0)
    ones = torch.ones(g.hidden, device="cuda", dtype=torch.bfloat16)
    step = torch.full((1,), 0.02, device="cuda")
    cached = "kv" in options

    def layer() -> Layer:
        return Layer(
            input_norm=ones,
            qkv=random_linear((g.heads + 2 * g.kv_heads) * g.head_dim, g.hidden, scheme),
            q_norm=None,
            k_norm=None,
            out=random_linear(g.hidden, g.heads * g.head_dim, scheme),
            post_norm=ones,
            gate_up=random_linear(2 * g.intermediate, g.hidden, scheme),
            down=random_linear(g.hidden, g.intermediate, scheme),
            kv_scales=(step, step) if cached else None,
        )

    embedding = torch.randn(g.vocab, g.hidden, device="cuda", dtype=torch.bfloat16) * 0.02
    if head_scheme is None:
        head = make_linear([StoredLinear(embedding, None)], torch.bfloat16)
    else:
        head = random_linear(g.vocab, g.hidden, head_scheme)
    table = make_table(StoredLinear(embedding, None), torch.bfloat16)
    ropes = {"": Rope(SHAPE, torch.device("cuda"))}
    layout = Layout(schemes={}, kv_cache=KV8) if cached else None
    return Decoder(g, table, [layer() for _ in range(g.layers)], ones, head, ropes, layout)


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ceilings() -> dict[str, float]:
    """Copy bandwidth in bytes/s (read and written) and bf16 FLOP/s."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def median(work: Callable[[], object]) -> float:
        return statistics.median([seconds(work) for _ in range(20)][3:])

    return {
        "copy_bytes_per_second": 2 * source.numel() / median(lambda: target.copy_(source)),
        "bf16_flops": 2 * 8192**3 / median(lambda: a @ b),
    }


def read_bytes(decoder: Decoder, batch: int, context: int) -> int:
    """What one decode step must read."""
    g = decoder.geometry
    linears = sum(linear.num_bytes for layer in decoder.layers for linear in layer.linears)
    cache = 2 * g.layers * g.kv_heads * g.head_dim * decoder.cache_dtype.itemsize
    return linears + decoder.head.num_bytes + batch * context * cache


_SEEDS = itertools.count()


def prompts(count: int, length: int) -> list[list[int]]:
    """Random ones, others at each call."""
    generator = torch.Generator().manual_seed(next(_SEEDS))
    ids: list[list[int]] = torch.randint(128_000, (count, length), generator=generator).tolist()
    return ids


def decode(engine: Engine, batch: int, prompt: int, output: int) -> list[float]:
    """Seconds of each step after the prompts are computed."""
    for ids in prompts(batch, prompt):
        engine.add(ids, SamplingParams(max_tokens=output))
    times: list[float] = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times[-(output - 2) :]


def start_decoding(engine: Engine, batch: int, output: int) -> None:
    """Bring requests to where each step is a token of all of them."""
    for ids in prompts(batch, 384):
        engine.add(ids, SamplingParams(max_tokens=output))
    while engine.num_waiting:
        engine.step()
    for _ in range(10):
        engine.step()


def idle_share(engine: Engine) -> float:
    """Share of 100 decode steps of 64 requests in which the GPU does nothing."""
    start_decoding(engine, 64, 140)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(100):
            engine.step()
        torch.cuda.synchronize()
    while engine.has_work:
        engine.step()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    begun, reached, busy = spans[0][0], spans[0][0], 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - begun)


def kernel_times(engine: Engine, batch: int, steps: int) -> dict[str, list[float]]:
    """Microseconds and launches a decode step of the kernels that take longest."""
    start_decoding(engine, batch, steps + 50)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    while engine.has_work:
        engine.step()
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {
        event.key[:60]: [round(event.self_device_time_total / steps, 1), event.count // steps]
        for event in kernels[:14]
    }


def requests(engine: Engine, in_flight: int, count: int) -> float:
    """Requests/s of `count` requests of 512 tokens in and 128 out."""
    waiting = prompts(count, 512)
    running, finished = 0, 0
    start = time.perf_counter()
    while finished < count:
        while waiting and running < in_flight:
            engine.add(waiting.pop(), SamplingParams(max_tokens=128))
            running += 1
        done = sum(request.finished is not None for request in engine.step())
        running -= done
        finished += done
    return count / (time.perf_counter() - start)


def measure(name: str, limits: dict[str, float], repeats: int) -> dict[str, Any]:
    decoder = random_decoder(name)
    config = EngineConfig(
        max_batch_size=64, max_seq_len=2304, max_step_tokens=16_384, reuse_prefixes=False
    )
    begun = time.perf_counter()
    engine = Engine(decoder, config)
    engine.generate(prompts(2, 20), SamplingParams(max_tokens=4))
    result: dict[str, Any] = {
        "paths": list(decoder.paths), "weight_bytes": decoder.weight_bytes,
        "first_tokens_seconds": time.perf_counter() - begun,
    }  # fmt: skip
    for batch in (1, 4, 64):
        decode(engine, batch, 384, 8)
        steps = [statistics.median(decode(engine, batch, 384, 256)) for _ in range(repeats)]
        step = statistics.median(steps)
        floor = read_bytes(decoder, batch, 512) / limits["copy_bytes_per_second"]
        result[f"decode-{batch}"] = {
            "tokens_per_second": batch / step, "step_ms": step * 1e3, "share": floor / step,
            "spread": (max(steps) - min(steps)) / step,
        }  # fmt: skip
    g = decoder.geometry
    tokens = 8 * 2048
    flops = 2 * tokens * g.layer_parameters * g.layers
    # causal attention: two products over half the square
    flops += 2 * 8 * g.layers * g.heads * g.head_dim * 2048**2

    def prefill() -> None:
        engine.generate(prompts(8, 2048), SamplingParams(max_tokens=1))

    prefill()
    times = [seconds(prefill) for _ in range(max(3, repeats))]
    took = statistics.median(times)
    result["prefill"] = {
        "seconds": took, "tokens_per_second": tokens / took, "share": flops / took / limits["bf16_flops"],
        "spread": (max(times) - min(times)) / took,
    }  # fmt: skip
    for in_flight, count in ((64, 256), (4, 32)):
        requests(engine, in_flight, count)  # captures its graphs
        rates = [requests(engine, in_flight, count) for _ in range(repeats)]
        rate = statistics.median(rates)
        result[f"requests-{in_flight}"] = {
            "requests_per_second": rate, "spread": (max(rates) - min(rates)) / rate,
        }  # fmt: skip
    result["idle"] = idle_share(engine)
    result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--repeats", type=int, default=3)
    names = ["bf16", "fp8", "fp8-kv", "int8", "int4", "bf16-21", "fp8-21", "fp8-kv-21"]
    parser.add_argument("--models", nargs="+", default=names)
    arguments = parser.parse_args()
    limits = ceilings()
    print({name: f"{value:.3g}" for name, value in limits.items()})
    models: dict[str, Any] = {}
    for name in arguments.models:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        models[name] = measure(name, limits, arguments.repeats)
        print(name)
        for row, values in models[name].items():
            if isinstance(values, dict):
                print(f"  {row:12}", {k: float(f"{v:.4g}") for k, v in values.items()})
            else:
                print(f"  {row}: {values}")
        record = {
            "model": "Llama-3.2-3B's shape, random weights",
            "environment": environment(torch.device("cuda")), "ceilings": limits, "models": models,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
