"""The chunked distillation loss against the plain one: peak memory and time, forward and backward.

The plain one is what a training script writes: logits of both models for all tokens, log-softmax,
torch's kl_div. Llama-3.2-3B's head (128,256 × 3,072), random hidden states, bf16; the loss alone, its
gradients with respect to hidden states and head included. On one GPU.

    python -m benchmarks.distillation_loss --out RESULT.json [--tokens 8192] [--repeats 10]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.benchmark import environment
from tinier.distillation import Soft, chunked_loss

HIDDEN, VOCAB = 3072, 128256


def plain(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = F.log_softmax(F.linear(teacher, teacher_head).float(), dim=-1)
    own = F.log_softmax(F.linear(hidden, head).float(), dim=-1)
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True)


def chunked(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    return chunked_loss(hidden, head, Soft(teacher, teacher_head))


def measure(loss: Callable[..., Tensor], tensors: list[Tensor], repeats: int) -> dict[str, object]:
    hidden, head = tensors[:2]
    times = []
    for number in range(repeats + 2):  # two to warm up
        hidden.grad = head.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        value = loss(*tensors)
        value.backward()
        end.record()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        if number >= 2:
            times.append(start.elapsed_time(end))
    assert hidden.grad is not None
    assert head.grad is not None
    return {
        "value": value.item(),
        "gradient_norms": [hidden.grad.float().norm().item(), head.grad.float().norm().item()],
        "milliseconds": statistics.median(times),
        "milliseconds_spread": [min(times), max(times)],
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    result: dict[str, object] = {"environment": environment(torch.device("cuda"))}
    for tokens in arguments.tokens:
        generator = torch.Generator("cuda").manual_seed(0)

        def random(rows: int, scale: float, generator: torch.Generator = generator) -> Tensor:
            noise = torch.randn(rows, HIDDEN, device="cuda", generator=generator) * scale
            return noise.bfloat16()

        teacher, head = random(tokens, 1.0), random(VOCAB, 0.03)
        hidden = (teacher + 0.3 * random(tokens, 1.0)).requires_grad_()
        own_head = head.clone().requires_grad_()
        tensors = [hidden, own_head, teacher, head]
        rows = {name: measure(f, tensors, arguments.repeats)
                for name, f in (("plain", plain), ("chunked", chunked))}  # fmt: skip
        ratio = {
            "memory": rows["plain"]["peak_bytes"] / rows["chunked"]["peak_bytes"],  # type: ignore[operator]
            "speed": rows["plain"]["milliseconds"] / rows["chunked"]["milliseconds"],  # type: ignore[operator]
        }
        result[f"{tokens} tokens"] = rows | {"plain_over_chunked": ratio}
        print(tokens, json.dumps(rows), ratio, flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
