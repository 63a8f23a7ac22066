"""Perplexity, and divergence from the original model, on held-out windows.

Start at `evaluate`. In: a decoder, windows [n, length], and the original's final hidden states
(`reference_states`), from which its logits are made again chunk by chunk, so that no [tokens, vocab]
matrix is ever whole. Every window is predicted from its second token on; all figures are means over
the same tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.engine import Decoder
from tinier.kernels import Linear
from tinier.progress import bar

_BATCH_TOKENS = 2048
_CHUNK_TOKENS = 128


class Reference(NamedTuple):
    """The original model's predictions, kept as what they are made from."""

    hidden: Tensor
    """[windows, length, hidden], on the CPU"""
    head: Linear
    """Hidden states [T, hidden] to logits [T, vocab]; the rest of the model need not stay"""
    device: torch.device
    """Where it computes them"""
    divisor: float
    """What they are divided by"""


@dataclass(frozen=True, kw_only=True)
class Quality:
    perplexity: float | None
    """exp(mean negative log-likelihood per token); None where the logits are not numbers"""
    nll_stderr: float | None
    """Standard error of the mean negative log-likelihood, over windows; None for one window."""
    kl: float | None
    """Mean KL(original ‖ this) per token in nats; None without an original, or without numbers."""
    kl_stderr: float | None
    """Standard error of that mean, over windows."""
    top1_agreement: float | None
    """Share of tokens where both models' most likely next token is the same."""
    tokens: int
    """Predicted tokens."""


def reference_states(decoder: Decoder, windows: Tensor) -> Reference:
    """Run the original once over the windows [n, length]."""
    hidden = [h.cpu() for h in _batches(decoder, windows, "original model")]
    divisor = decoder.geometry.multipliers.logits
    return Reference(torch.cat(hidden), decoder.head, decoder.device, divisor)


def evaluate(decoder: Decoder, windows: Tensor, reference: Reference | None = None) -> Quality:
    """Measure a model on windows [n, length] of token ids; against `reference` if it is given."""
    sums: list[tuple[float, float, int]] = []  # per window: nll, kl, agreements
    for hidden in _batches(decoder, windows, "evaluate"):
        for window in hidden:
            i = len(sums)
            sums.append(_window_sums(decoder, window, windows[i], reference, i))
    per_window = windows.shape[1] - 1
    nll = torch.tensor([s[0] for s in sums], dtype=torch.float64) / per_window
    kl = torch.tensor([s[1] for s in sums], dtype=torch.float64) / per_window
    tokens = per_window * len(sums)
    return Quality(
        perplexity=_finite(torch.exp(nll.mean())),
        nll_stderr=stderr(nll),
        kl=_finite(kl.mean()) if reference else None,
        kl_stderr=stderr(kl) if reference else None,
        top1_agreement=sum(s[2] for s in sums) / tokens if reference else None,
        tokens=tokens,
    )


@torch.inference_mode()
def _window_sums(
    decoder: Decoder,
    hidden: Tensor,
    tokens: Tensor,
    reference: Reference | None,
    index: int,
) -> tuple[float, float, int]:
    """Sums over one window's predictions: negative log-likelihood, KL, equal first choices."""
    nll = kl = 0.0
    agreements = 0
    targets = tokens[1:].to(hidden.device)
    for start in range(0, len(targets), _CHUNK_TOKENS):
        rows = slice(start, min(start + _CHUNK_TOKENS, len(targets)))
        logits = decoder.logits_float32(hidden[rows])  # [chunk, vocab]
        nll -= torch.log_softmax(logits, dim=-1).gather(1, targets[rows].unsqueeze(1)).sum().item()
        if reference is None:
            continue
        states = reference.hidden[index][rows].to(reference.device)
        original = reference.head.float32(states) / reference.divisor
        # one may be padded to more tokens than the other
        common = min(logits.shape[1], original.shape[1])
        own = torch.log_softmax(logits[:, :common], dim=-1)
        base = torch.log_softmax(original[:, :common], dim=-1)
        agreements += int((own.argmax(dim=-1) == base.argmax(dim=-1)).sum())
        kl += torch.dot(base.exp().flatten(), base.sub_(own).flatten()).item()
    return nll, kl, agreements


def _batches(decoder: Decoder, windows: Tensor, label: str) -> list[Tensor]:
    """Final hidden states of the windows, batch by batch, each [batch, length, hidden]."""
    size = max(1, _BATCH_TOKENS // windows.shape[1])
    states = []
    with bar(label, len(windows)) as advance:
        for batch in windows.split(size):
            states.append(decoder.hidden_states(batch))
            advance(len(batch))
    return states


def stderr(means: Tensor) -> float | None:
    """Standard error of the mean of [n]; None for one, or without numbers."""
    if len(means) < 2:
        return None
    return _finite(means.std(unbiased=True) / math.sqrt(len(means)))


def _finite(value: Tensor) -> float | None:
    # None, not NaN: JSON has no NaN
    return value.item() if torch.isfinite(value) else None
