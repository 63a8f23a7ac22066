"""Holds a server under load, or under abuse, and looks at what it answered.

`hold`: so many streaming connections at once, each asking for one long completion after the other; every
stream must be whole, and the server's memory flat. `abuse`: random requests for so many minutes, good ones
(each answer compared with the same request's first answer), malformed, too long, cut off in the middle, and
models loaded and unloaded meanwhile; SIGTERM at the end, under load.

    python -m benchmarks.serving_soak hold  --out RESULT.json [--connections 1000] [--minutes 10]
    python -m benchmarks.serving_soak abuse --out RESULT.json [--minutes 30]
"""

import argparse
import asyncio
import collections
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from tests.conftest import write_tiny

from tinier.benchmark import environment

Answer = tuple[int, str, int, bool]
"""Status, text, tokens, whether the stream came to its end"""


async def ask(url: str, path: str, raw: bytes, *, leave_after: int | None = None) -> Answer:
    """One POST over a raw socket. leave_after: close after so many lines of the answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Length: {len(raw)}\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        text, tokens, whole, lines = "", 0, False, 0
        while line := await reader.readline():
            lines += 1
            if leave_after is not None and lines > leave_after:
                break
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                data = json.loads(line[6:])
                if "error" in data:
                    return 500, json.dumps(data), tokens, False
                text += "".join(choice["text"] for choice in data["choices"])
                if data.get("usage"):
                    tokens = data["usage"]["completion_tokens"]
        return status, text, tokens, whole
    finally:
        writer.close()


def body(prompt: list[int], tokens: int, model: str = "m") -> bytes:
    return json.dumps({
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip


class Served:
    """`tinier serve` in a process of its own over a tiny model."""

    def __init__(self, *options: str, load: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp())
        for name, seed in (("a", 0), ("b", 1)):
            write_tiny(
                self.folder / name, "llama", dtype=torch.float32, seed=seed, num_hidden_layers=2,
                max_position_embeddings=2048,
            )  # fmt: skip
        command = [sys.executable, "-m", "tinier", "serve", f"m={self.folder / 'a'}", "--port", "0",
                   "--device", "cpu", *options]  # fmt: skip
        if load:
            command += ["--allow-load", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]

    def megabytes(self) -> list[float]:
        """Of the server and of its workers."""
        server = psutil.Process(self.process.pid)
        every = [server, *server.children(recursive=True)]
        return [round(p.memory_info().rss / 2**20, 1) for p in every]


async def hold(served: Served, connections: int, minutes: float, tokens: int) -> dict[str, Any]:
    end = time.monotonic() + 60 * minutes
    counts: collections.Counter[str] = collections.Counter()
    expected: dict[int, str] = {}
    memory: list[list[float]] = []
    running = 0
    most = 0

    async def connection(i: int) -> None:
        nonlocal running, most
        prompt = [i % 50 + 1, 7, 9]
        while time.monotonic() < end:
            running += 1
            most = max(most, running)
            try:
                status, text, got, whole = await ask(
                    served.url, "/v1/completions", body(prompt, tokens)
                )
            except (OSError, ValueError, IndexError) as error:
                counts[f"broken: {type(error).__name__}"] += 1
                continue
            finally:
                running -= 1
            if status != 200:
                counts[f"status {status}"] += 1
            elif not whole or got != tokens:
                counts["lost tokens"] += 1
            elif expected.setdefault(prompt[0], text) != text:
                counts["other text"] += 1
            else:
                counts["right"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(served.megabytes())
            await asyncio.sleep(10)

    await asyncio.gather(watch(), *(connection(i) for i in range(connections)))
    return {"answers": dict(counts), "most_at_once": most, "memory_megabytes": memory}


async def abuse(served: Served, minutes: float) -> dict[str, Any]:
    end = time.monotonic() + 60 * minutes
    counts: collections.Counter[str] = collections.Counter()
    expected: dict[str, str] = {}
    wrong: list[str] = []
    memory: list[list[float]] = []
    stopping = False

    def note(kind: str, allowed: set[int], status: int, text: str = "") -> None:
        counts[f"{kind} {status}"] += 1
        if status not in allowed and not (stopping and status == 503):
            wrong.append(f"{kind}: {status} {text[:200]}")

    async def good(draw: random.Random) -> None:
        prompt, tokens = (
            [draw.randrange(1, 250) for _ in range(draw.choice([1, 5, 40]))],
            draw.randrange(1, 120),
        )
        raw = body(prompt, tokens)
        status, text, got, whole = await ask(served.url, "/v1/completions", raw)
        note("good", {200, 429}, status, text)
        if status == 200 and (
            not whole or got != tokens or expected.setdefault(raw.hex(), text) != text
        ):
            wrong.append(f"good: {got} of {tokens} tokens, whole: {whole}")

    async def malformed(draw: random.Random) -> None:
        whole = body([1, 2, 3], 5)
        raw = draw.choice([
            whole[: draw.randrange(len(whole))], bytes(draw.randrange(256) for _ in range(100)), b"",
            b"[" * 5000, whole.replace(b"temperature", b"temprature"), whole.replace(b"3", b"-3"),
        ])  # fmt: skip
        status, text, _, _ = await ask(
            served.url, draw.choice(["/v1/completions", "/v1/chat/completions"]), raw
        )
        note("malformed", {400, 404}, status, text)

    async def oversized(draw: random.Random) -> None:
        raw = body([1] * draw.choice([3000, 3_000_000]), 5)
        try:
            status, text, _, _ = await ask(served.url, "/v1/completions", raw)
        except ConnectionError:  # the server need not read to the end what it refuses
            counts["oversized closed"] += 1
            return
        note("oversized", {400, 413}, status, text)

    async def leaving(draw: random.Random) -> None:
        raw = body([draw.randrange(1, 250)], 200)
        status, text, _, _ = await ask(
            served.url, "/v1/completions", raw, leave_after=draw.randrange(30)
        )
        note("leaving", {200, 429}, status, text)

    async def user(seed: int) -> None:
        draw = random.Random(seed)
        kinds = [good] * 5 + [malformed, oversized, leaving]
        while time.monotonic() < end or not stopping:
            if stopping:
                return
            try:
                await draw.choice(kinds)(draw)
            except (OSError, ValueError, IndexError) as error:
                if not stopping:
                    wrong.append(f"broken: {error!r}")

    async def reload() -> None:
        while time.monotonic() < end:
            for path, model in (("load", "other=b"), ("unload", "other")):
                raw = json.dumps({"model": model}).encode()
                status, text, _, _ = await ask(served.url, f"/v1/models/{path}", raw)
                note(path, {200}, status, text)
                if path == "load":
                    status, text, _, _ = await ask(
                        served.url, "/v1/completions", body([5], 20, "other")
                    )
                    note("of the loaded", {200, 429}, status, text)
            memory.append(served.megabytes())
            await asyncio.sleep(5)

    async def stop() -> None:
        nonlocal stopping
        await asyncio.sleep(max(0, end - time.monotonic()) + 1)
        stopping = True
        served.process.send_signal(signal.SIGTERM)

    await asyncio.gather(stop(), reload(), *(user(seed) for seed in range(24)))
    code = await asyncio.to_thread(served.process.wait, 60)
    return {"answers": dict(counts), "wrong": wrong, "exit_code": code, "memory_megabytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["hold", "abuse"])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int, default=200, help="of each completion held")
    a = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    if a.what == "hold":
        served = Served("--max-queue", "2000", "--max-batch-size", "64", "--max-seq-len", "256")
        work = hold(served, a.connections, a.minutes or 10, a.tokens)
    else:
        served = Served(
            "--max-queue", "16", "--max-batch-size", "16", "--max-seq-len", "256", "--memory", "4GB",
            load=True,
        )  # fmt: skip
        work = abuse(served, a.minutes or 30)
    begun = time.time()
    try:
        result = asyncio.run(work)
    finally:
        served.process.terminate()
        served.process.wait(60)
    result |= {"what": a.what, "seconds": time.time() - begun,
               "environment": environment(torch.device("cpu"))}  # fmt: skip
    a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({k: v for k, v in result.items() if k not in ("environment", "memory_megabytes")})
    print(
        "memory, first and last:", result["memory_megabytes"][:2], result["memory_megabytes"][-2:]
    )


if __name__ == "__main__":
    main()
