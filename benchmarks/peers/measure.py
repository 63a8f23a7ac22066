"""How far a quantized model is from its 16-bit base: KL divergence, perplexity, top-1 agreement.

Imported by the peer scripts, and run on its own for a checkpoint on disk (16-bit or
compressed-tensors), in any environment with torch, transformers and safetensors:

    python -m benchmarks.peers.measure CHECKPOINT BASE TOKENS.safetensors --dtype float32

TOKENS holds an int64 tensor `evaluation` [windows, length]. Prints one line of JSON.
"""

import argparse
import json
import math

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model in `folder`, its 16-bit weights cast to `dtype` ("auto": as stored)."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    base_folder: str,
    windows: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """`kl` is the mean KL(base || model) in nats per token and `top1` the share of equal most
    likely tokens, both over all positions; perplexities leave out each window's first token."""
    base = load(base_folder, dtype)
    model.eval()
    kl = agreed = model_nll = base_nll = 0.0
    for window in windows:
        tokens = window[None]
        log_p = _log_probabilities(base, tokens)
        log_q = _log_probabilities(model, tokens)
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).sum(dtype=torch.float64).item()
        agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        base_nll += _negative_log_likelihood(log_p, window)
        model_nll += _negative_log_likelihood(log_q, window)
    positions, predicted = windows.numel(), windows.numel() - len(windows)
    return {
        "kl": kl / positions,
        "perplexity": math.exp(model_nll / predicted),
        "top1": agreed / positions,
        "base_perplexity": math.exp(base_nll / predicted),
    }


def _log_probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _negative_log_likelihood(log_probabilities: torch.Tensor, window: torch.Tensor) -> float:
    chosen = log_probabilities[:-1].gather(1, window[1:, None])
    return -chosen.sum(dtype=torch.float64).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("base")
    parser.add_argument("tokens")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    model = load(arguments.checkpoint, dtype)
    windows = load_file(arguments.tokens)["evaluation"]
    print(json.dumps(measure(model, arguments.base, windows, dtype)))


if __name__ == "__main__":
    main()
