"""Perplexity, and divergence from the original model, on held-out windows.

Start at `evaluate_windows`; `written_text` gives the windows that a model writes itself. In: a decoder,
windows [n, length], and the original's final hidden states (`reference_states`), from which its logits
are made again chunk by chunk, so that no [tokens, vocab] matrix is ever whole. Every window is predicted
from its second token on; all figures are means over the same tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.engine import Decoder, Engine, SamplingParams
from tinier.evaluation.shown import quality_html
from tinier.kernels import Linear
from tinier.progress import bar

OWN_PROMPT = 32
"""Tokens of a window that a model continues"""
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
    top1_stderr: float | None = None
    """Standard error of that share, over windows."""
    tokens: int
    """Predicted tokens."""

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return quality_html(self)


def reference_states(decoder: Decoder, windows: Tensor) -> Reference:
    """Run the original once over the windows [n, length]."""
    hidden = [h.cpu() for h in _batches(decoder, windows, "original model")]
    divisor = decoder.geometry.multipliers.logits
    return Reference(torch.cat(hidden), decoder.head, decoder.device, divisor)


def evaluate_windows(
    decoder: Decoder, windows: Tensor, reference: Reference | None = None, *, given: int = 1
) -> Quality:
    """Measure a model on windows [n, length] of token ids; against `reference` if there is one.

    given: tokens at the start of each window that are not predicted.
    """
    sums: list[tuple[float, float, int]] = []  # per window: nll, kl, agreements
    for hidden in _batches(decoder, windows, "evaluate"):
        for window in hidden:
            i = len(sums)
            sums.append(_window_sums(decoder, window, windows[i], reference, i, given))
    per_window = windows.shape[1] - given
    nll = torch.tensor([s[0] for s in sums], dtype=torch.float64) / per_window
    kl = torch.tensor([s[1] for s in sums], dtype=torch.float64) / per_window
    same = torch.tensor([s[2] for s in sums], dtype=torch.float64) / per_window
    tokens = per_window * len(sums)
    return Quality(
        perplexity=_finite(torch.exp(nll.mean())),
        nll_stderr=stderr(nll),
        kl=_finite(kl.mean()) if reference else None,
        kl_stderr=stderr(kl) if reference else None,
        top1_agreement=same.mean().item() if reference else None,
        top1_stderr=stderr(same) if reference else None,
        tokens=tokens,
    )


@torch.inference_mode()
def _window_sums(
    decoder: Decoder,
    hidden: Tensor,
    tokens: Tensor,
    reference: Reference | None,
    index: int,
    given: int,
) -> tuple[float, float, int]:
    """Sums over one window's predictions: negative log-likelihood, KL, equal first choices."""
    nll = kl = 0.0
    agreements = 0
    tokens = tokens.to(hidden.device)
    for start in range(given - 1, len(tokens) - 1, _CHUNK_TOKENS):
        rows = slice(start, min(start + _CHUNK_TOKENS, len(tokens) - 1))
        targets = tokens[start + 1 : rows.stop + 1].unsqueeze(1)
        logits = decoder.logits_float32(hidden[rows])  # [chunk, vocab]
        nll -= torch.log_softmax(logits, dim=-1).gather(1, targets).sum().item()
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


def written_text(engine: Engine, windows: Tensor, length: int) -> Tensor:
    """What a model writes greedily after the first OWN_PROMPT tokens of windows [n, ...], its end token
    notwithstanding: [n, OWN_PROMPT + length]."""
    params = SamplingParams(max_tokens=length)
    prompts = windows[:, :OWN_PROMPT].tolist()
    requests = [engine.add(tokens, params) for tokens in prompts]
    with bar("writes", len(requests)) as advance:
        while engine.has_work:
            advance(sum(request.finished is not None for request in engine.step()))
    return torch.tensor([request.prompt + request.output for request in requests])


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
