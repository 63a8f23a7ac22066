"""tinier's engine as a worker of benchmarks/cpu_decode.py:

PYTHON benchmarks/peers/tinier_decode.py CHECKPOINT
"""

import torch
from decode_worker import THREADS, Generate, Output, serve

from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model


def load(folder: str) -> Generate:
    torch.set_num_threads(THREADS)
    config = EngineConfig(reuse_prefixes=False, max_batch_size=1, max_seq_len=512, device="cpu")
    engine = Engine(open_model(folder), config)

    def generate(prompt: list[int], tokens: int) -> Output:
        request = engine.add(prompt, SamplingParams(max_tokens=tokens))
        while engine.has_work:
            engine.step()
        return Output(request.output, len(request.output), request.token_times)

    return generate


if __name__ == "__main__":
    serve("tinier", load)
