"""What HTTP costs: requests/s and time to first token of `tinier serve` beside the engine in process.

Closed loop: so many requests in flight, streaming, prompts of random tokens, no end token. In process:
the same engine configuration, driven by a loop that takes every token. The two take turns; the client
is a process of its own that reads raw sockets.

    python -m benchmarks.serving_speed MODEL --out RESULT.json [--concurrency 64] [--input 512]
    python -m benchmarks.serving_speed random-llama-3b-fp8 --out RESULT.json     # makes it first
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HAS_USAGE = re.compile(rb'"usage": ?\{')

Load = tuple[int, int, int, int]
"""Requests, in flight, input tokens, output tokens"""


async def one(url: str, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first token, and output tokens, of one streamed completion."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    begun = time.perf_counter()
    writer.write(head.encode() + content)
    first, tokens = 0.0, 0
    while line := await reader.readline():
        if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError((line + await reader.read()).decode())
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - begun
            if HAS_USAGE.search(line):
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    return first, tokens


async def closed_loop(url: str, bodies: list[dict[str, Any]], in_flight: int) -> dict[str, float]:
    count = len(bodies)
    firsts: list[float] = []

    async def worker() -> None:
        while bodies:
            body = bodies.pop()
            first, tokens = await one(url, body)
            assert tokens == body["max_tokens"], f"{tokens} of {body['max_tokens']} tokens came"
            firsts.append(first)

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    took = time.perf_counter() - begun
    return {"requests_per_second": count / took, "ttft_ms": 1e3 * statistics.median(firsts)}


def over_http(url: str, bodies: list[dict[str, Any]], in_flight: int) -> dict[str, float]:
    """Requests/s and median time to first token of a client in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving_speed", "--client"]
    asked = json.dumps({"url": url, "bodies": bodies, "in_flight": in_flight})
    done = subprocess.run(command, input=asked, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def completion(model: str, prompt: list[int] | str, output: int) -> dict[str, Any]:
    """A streamed, greedy completion of exactly `output` tokens, for OpenAI servers that can."""
    return {
        "model": model, "prompt": prompt, "max_tokens": output, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def random_prompts(load: Load, vocab: int, seed: int) -> list[list[int]]:
    count, _, length, _ = load
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


def in_process(engine: Any, load: Load, vocab: int, seed: int) -> dict[str, float]:
    from tinier.engine import SamplingParams

    count, in_flight, _, output = load
    prompts = random_prompts(load, vocab, seed)
    params = SamplingParams(max_tokens=output)
    firsts: list[float] = []
    taken, running = 0, 0
    begun = time.perf_counter()
    while len(firsts) < count:
        while prompts and running < in_flight:
            engine.add(prompts.pop(), params)
            running += 1
        for request in engine.step():
            taken += 1
            if request.finished:
                firsts.append(request.token_times[0] - request.arrived)
                running -= 1
    took = time.perf_counter() - begun
    assert taken == count * output
    return {"requests_per_second": count / took, "ttft_ms": 1e3 * statistics.median(firsts)}


def random_llama_fp8(folder: Path) -> Path:
    """Llama-3.2-3B's shape with random weights in FP8, head too."""
    from benchmarks.guide_shape import write_random_llama

    from tinier.families import open_model
    from tinier.quantization import QuantizePlan, quantize

    if not (folder / "fp8").exists():
        write_random_llama(folder / "bf16")
        plan = QuantizePlan(preset="fp8", head="fp8")
        quantize(open_model(str(folder / "bf16")), plan, folder / "fp8", device="cuda")
    return folder / "fp8"


def measure(model: str, loads: dict[str, Load], engine_bytes: str, rounds: int) -> dict[str, Any]:
    from tinier.device import pick_device
    from tinier.engine import Engine, EngineConfig
    from tinier.families import open_model

    most = max(load[1] for load in loads.values())
    length = max(load[2] + load[3] for load in loads.values())
    limits = {"max_batch_size": most, "max_seq_len": length}
    checkpoint = open_model(model)
    steps = max(2048, most)
    config = EngineConfig(**limits, max_step_tokens=steps, reuse_prefixes=False)
    engine = Engine(checkpoint, config)
    vocab = engine.decoder.geometry.vocab
    options = {"port": 0, "memory": engine_bytes, "max-batch-size": most, "max-seq-len": length}
    command = [sys.executable, "-m", "tinier", "serve", f"m={model}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    results: dict[str, Any] = {name: {"http": [], "in_process": []} for name in loads}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        for round_ in range(rounds + 1):
            for i, (name, load) in enumerate(loads.items()):
                seed = 100 * round_ + i
                prompts = random_prompts(load, vocab, seed)
                bodies = [completion("m", prompt, load[3]) for prompt in prompts]
                pair = {
                    "in_process": in_process(engine, load, vocab, seed),
                    "http": over_http(url, bodies, load[1]),
                }
                print(name, pair, flush=True)
                if round_:  # the first compiles and captures
                    for kind, values in pair.items():
                        results[name][kind].append(values)
        server.send_signal(signal.SIGTERM)
    for result in results.values():
        rates = {k: [v["requests_per_second"] for v in result[k]] for k in ("http", "in_process")}
        ttfts = {k: statistics.median(v["ttft_ms"] for v in result[k]) for k in rates}
        ratios = [a / b for a, b in zip(rates["http"], rates["in_process"], strict=True)]
        result["requests_ratio"] = statistics.median(ratios)
        result["requests_ratio_spread"] = [min(ratios), max(ratios)]
        result["ttft_added_ms"] = ttfts["http"] - ttfts["in_process"]
        print({k: v for k, v in result.items() if k not in rates})
    del engine
    from tinier.benchmark import environment

    return {
        "model": model,
        "environment": environment(pick_device("auto")),
        "loads": loads,
        "results": results,
    }


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        print(json.dumps(asyncio.run(closed_loop(**json.load(sys.stdin)))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", default="30GB", help="of the server: two engines are loaded at once"
    )
    a = parser.parse_args()
    model = a.model
    if model == "random-llama-3b-fp8":
        model = str(random_llama_fp8(Path(tempfile.gettempdir()) / "serving-speed"))
    loads: dict[str, Load] = {
        "streams": (a.requests, a.concurrency, a.input, a.output),
        "single": (8, 1, a.input, min(16, a.output)),
    }
    record = measure(model, loads, a.memory, a.rounds)
    record["model"] = a.model
    a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
