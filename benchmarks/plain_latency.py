"""Latency of plain requests to two versions' servers, by turns: the one of another checkout and this one.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.plain_latency MODEL --before /tmp/before --out RESULT.json [--requests 40]

Streamed greedy completions, one at a time: milliseconds to the first event and for all 32 tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from tinier.benchmark import environment

PORTS = {"before": 8301, "now": 8302}
BODY = {
    "model": "m", "prompt": "The old lighthouse keeper looked at the sea and", "max_tokens": 32,
    "temperature": 0, "stream": True,
}  # fmt: skip


def serve(model: str, checkout: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tinier.cli.main", "serve", f"m={model}", "--port", str(port)]
    environ = os.environ | {"PYTHONPATH": str(checkout / "src")}
    return subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)


def ask(port: int) -> dict[str, float]:
    """Milliseconds of one request."""
    url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(BODY).encode(), headers)
    started, first = time.perf_counter(), 0.0
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if not first and line.startswith(b"data:"):
                first = time.perf_counter() - started
    return {"first": first * 1e3, "all": (time.perf_counter() - started) * 1e3}


def wait_for(port: int) -> None:
    for _ in range(240):
        try:
            ask(port)
            return
        except OSError:  # it is not up
            time.sleep(0.5)
    raise SystemExit(f"no server answers at port {port}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    here = Path(__file__).parent.parent
    checkouts = {"before": arguments.before, "now": here}
    servers = [serve(arguments.model, path, PORTS[name]) for name, path in checkouts.items()]
    try:
        for port in PORTS.values():
            wait_for(port)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in PORTS}
        for turn in range(arguments.requests):
            for name in (*PORTS,) if turn % 2 else (*PORTS,)[::-1]:
                found[name].append(ask(PORTS[name]))
    finally:
        for server in servers:
            server.terminate()
    record: dict[str, Any] = {
        "command": " ".join(sys.argv), "environment": environment(torch.device("cpu")),
        "before": subprocess.check_output(
            ["git", "-C", str(arguments.before), "rev-parse", "HEAD"], text=True
        ).strip(),
    }  # fmt: skip
    for what in ("first", "all"):
        ratios = [n[what] / b[what] for n, b in zip(found["now"], found["before"], strict=True)]
        record[what] = {
            "ratio": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "milliseconds": {n: statistics.median(r[what] for r in rows) for n, rows in found.items()},
        }  # fmt: skip
        print(what, record[what], flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
