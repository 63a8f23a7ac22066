"""transformers' `generate`, bf16, as a worker of benchmarks/cpu_decode.py:

PYTHON benchmarks/peers/transformers_decode.py CHECKPOINT
"""

import time

import torch
from decode_worker import THREADS, Generate, Output, serve
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def load(folder: str) -> Generate:
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], tokens: int) -> list[Output]:
        """As one batch: they are of one length."""
        clock = Clock()
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        made = out[:, ids.shape[1] :].tolist()
        return [Output(row, len(row), clock.times) for row in made]

    return generate


if __name__ == "__main__":
    serve("transformers", load)
