"""llama.cpp as a worker of benchmarks/cpu_decode.py. In its own environment:

    ENV/bin/python benchmarks/peers/llamacpp_decode.py FILE.gguf

xllamacpp runs llama.cpp's server in this process; tokens arrive as the pieces of a streamed answer.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp
from decode_worker import THREADS, Generate, Output, serve


def load(file: str) -> Generate:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 8 * 1024
    params.n_parallel = 8
    params.cpuparams.n_threads = THREADS
    params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)

    def one(prompt: list[int], tokens: int) -> Output:
        pieces: list[Any] = []
        times: list[float] = []

        def note(piece: Any) -> None:
            times.append(time.perf_counter())
            pieces.append(piece)

        request = {
            "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True,
            "cache_prompt": False, "stream": True,
        }  # fmt: skip
        server.handle_completions(request, note)
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        # the last piece is empty and brings the counts
        return Output(text, pieces[-1]["usage"]["completion_tokens"], times[:-1])

    def generate(prompts: list[list[int]], tokens: int) -> list[Output]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: one(prompt, tokens), prompts))

    return generate


if __name__ == "__main__":
    serve("xllamacpp", load)
