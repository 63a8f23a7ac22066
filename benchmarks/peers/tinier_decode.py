"""tinier's engine as a worker of benchmarks/cpu_decode.py:

PYTHON benchmarks/peers/tinier_decode.py CHECKPOINT
"""

import os

import torch
from decode_worker import THREADS, Generate, Output, serve

from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model
from tinier.kernels import native


def load(folder: str) -> Generate:
    torch.set_num_threads(THREADS)
    march = os.environ.get("BENCHMARK_MARCH", "native")
    native._FLAGS = tuple(f"-march={march}" if "march" in flag else flag for flag in native._FLAGS)
    config = EngineConfig(reuse_prefixes=False, max_batch_size=8, max_seq_len=1024, device="cpu")
    engine = Engine(open_model(folder), config)

    def generate(prompts: list[list[int]], tokens: int) -> list[Output]:
        requests = [engine.add(prompt, SamplingParams(max_tokens=tokens)) for prompt in prompts]
        while engine.has_work:
            engine.step()
        return [Output(r.output, len(r.output), r.token_times) for r in requests]

    return generate


if __name__ == "__main__":
    serve("tinier", load)
