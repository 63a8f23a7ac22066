"""transformers' `generate`, bf16, as a worker of benchmarks/cpu_decode.py:

PYTHON benchmarks/peers/transformers_decode.py CHECKPOINT
"""

import time

import torch
from decode_worker import THREADS, Generate, Output, serve
from transformers import AutoModelForCausalLM


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(folder: str) -> Generate:
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], tokens: int) -> Output:
        clock = Clock()
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=clock
        )
        # the streamer is given the prompt first
        made = out[0, len(prompt) :].tolist()
        return Output(made, len(made), clock.times[1:])

    return generate


if __name__ == "__main__":
    serve("transformers", load)
