"""Servers beside each other on one machine: tinier, vLLM and transformers, the same 16-bit checkpoint.

Closed loop of streamed completions, greedy, no end token, prompts of random words that are a token each.
The servers take turns; those that are not measured are stopped (SIGSTOP), so that none takes another's
cores. vLLM and transformers live in environments of their own:

    python -m benchmarks.serving_peers smollm2-135m --out RESULT.json \\
        --vllm VLLM_ENV/bin/python --transformers TRANSFORMERS_ENV/bin/python
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.serving_speed import Load, completion, over_http

START_SECONDS = 300


def commands(folder: Path, limits: tuple[int, int], a: argparse.Namespace) -> dict[str, list[str]]:
    """How each server is started. float32: what is faster for the peers on a CPU without bf16 products."""
    most, length = map(str, limits)
    found = {
        "tinier": [
            sys.executable, "-m", "tinier", "serve", f"m={folder}", "--device", "cpu",
            "--max-batch-size", most, "--max-seq-len", length, "--memory", "3GB",
        ]
    }  # fmt: skip
    for suffix, dtype in (("", "bfloat16"), ("-float32", "float32")):
        if a.vllm:
            found[f"vllm{suffix}"] = [
                a.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
                "--served-model-name", "m", "--dtype", dtype, "--max-model-len", length,
                "--max-num-seqs", most, "--no-enable-prefix-caching",
            ]  # fmt: skip
        if a.transformers:
            serve = [a.transformers, "-m", "transformers.cli.transformers", "serve", str(folder)]
            found[f"transformers{suffix}"] = [*serve, "--dtype", dtype]
            found[f"transformers-batched{suffix}"] = [
                *serve, "--dtype", dtype, "--continuous-batching",
                "--cb-num-blocks", "64", "--cb-block-size", "32",
            ]  # fmt: skip
    return found


def body(server: str, folder: Path, prompt: str, output: int) -> dict[str, Any]:
    asked = completion("m", prompt, output)
    if server.startswith("transformers"):  # no end token, in its words
        asked["model"] = str(folder)
        del asked["ignore_eos"], asked["stream_options"]
        settings = {"max_new_tokens": output, "do_sample": False, "eos_token_id": -1}
        asked["generation_config"] = json.dumps(settings)
    return asked


def words(folder: Path) -> list[str]:
    """Words that are one token wherever they stand."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return [w for w in vocabulary if w[:1] == " " and w[1:].isascii() and w[1:].isalpha()]


@contextlib.contextmanager
def started(name: str, command: list[str], port: int, log: Path):  # type: ignore[no-untyped-def]
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environ, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} did not start: see {log}")
            time.sleep(0.5)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def measure(
    folder: Path, loads: dict[str, Load], servers: dict[str, list[str]], rounds: int, logs: Path
) -> dict[str, Any]:
    vocabulary = words(folder)
    results: dict[str, Any] = {load: {server: [] for server in servers} for load in loads}
    with contextlib.ExitStack() as stack:
        processes = {}
        for i, (server, command) in enumerate(servers.items()):
            entered = started(server, command, 8100 + i, logs / f"{server}.log")
            processes[server] = stack.enter_context(entered)
            os.killpg(processes[server].pid, signal.SIGSTOP)
        for round_ in range(rounds + 1):
            for i, (name, load) in enumerate(loads.items()):
                count, in_flight, length, output = load
                draw = random.Random(100 * round_ + i)
                prompts = ["".join(draw.choices(vocabulary, k=length)) for _ in range(count)]
                for port, server in enumerate(servers, 8100):
                    bodies = [body(server, folder, prompt, output) for prompt in prompts]
                    os.killpg(processes[server].pid, signal.SIGCONT)
                    one = over_http(f"http://127.0.0.1:{port}", bodies, in_flight)
                    os.killpg(processes[server].pid, signal.SIGSTOP)
                    print(round_, name, server, one, flush=True)
                    if round_:  # the first compiles
                        results[name][server].append(one)
    return results


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians and spread, and tinier's requests/s over each other's, round by round."""
    found: dict[str, Any] = {}
    for load, by_server in results.items():
        own = [one["requests_per_second"] for one in by_server["tinier"]]
        found[load] = {}
        for server, rounds in by_server.items():
            rates = [one["requests_per_second"] for one in rounds]
            ratios = [a / b for a, b in zip(own, rates, strict=True)]
            found[load][server] = {
                "requests_per_second": statistics.median(rates),
                "requests_per_second_spread": [min(rates), max(rates)],
                "ttft_ms": statistics.median(one["ttft_ms"] for one in rounds),
                "tinier_is_times_as_fast": statistics.median(ratios),
                "tinier_is_times_as_fast_spread": [min(ratios), max(ratios)],
            }
    return found


def version(python: str, package: str) -> str:
    code = f"import {package}; print({package}.__version__)"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def main() -> None:
    from tinier.benchmark import environment
    from tinier.device import pick_device
    from tinier.families import open_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--vllm", help="python of an environment with vLLM's CPU build")
    parser.add_argument(
        "--transformers", help="python of an environment with transformers[serving]"
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", nargs="*", help="only these")
    a = parser.parse_args()
    folder = open_model(a.model).folder
    loads: dict[str, Load] = {
        "streams": (a.requests, a.concurrency, a.input, a.output),
        "single": (6, 1, a.input, min(16, a.output)),
    }
    servers = commands(folder, (a.concurrency, a.input + a.output + 8), a)
    servers = {name: c for name, c in servers.items() if not a.servers or name in a.servers}
    results = measure(folder, loads, servers, a.rounds, a.out.parent)
    versions = {}
    if a.vllm:
        versions["vllm"] = version(a.vllm, "vllm")
    if a.transformers:
        versions["transformers"] = version(a.transformers, "transformers")
    record = {
        "model": a.model,
        "environment": environment(pick_device("cpu")),
        "peers": versions,
        "loads": loads,
        "summary": summary(results),
        "rounds": results,
    }
    a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
