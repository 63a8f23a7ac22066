"""KL divergence between what two streams of hidden states say of the next token."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.families import EMBEDDING, FINAL_NORM, HEAD, geometry_of, norm_weight
from tinier.progress import bar

# tokens whose logits are held at once
_CHUNK = 128

Stream = tuple[Tensor, Callable[[Tensor], Tensor]]
"""The last layer's outputs [n, length, hidden], and what makes float32 logits [T, vocab] of [T, hidden] of
them"""


def norm_and_head(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What logits are made with: the final norm's weight [hidden] and, in `dtype`, the head
    [vocab, hidden]."""
    geometry = geometry_of(checkpoint)
    with checkpoint.reader(device) as read:
        norm = norm_weight(read(FINAL_NORM), geometry)
        return norm, read(EMBEDDING if geometry.tied_head else HEAD).to(dtype)


@torch.no_grad()
def mean_divergences(exact: Stream, others: Sequence[Stream], device: torch.device) -> list[float]:
    """KL(exact ‖ other) of each other stream, in nats per token. device: where logits are made."""

    def log_likely(stream: Stream, rows: slice) -> Tensor:
        hidden, logits = stream
        return F.log_softmax(logits(hidden.flatten(0, 1)[rows].to(device)), dim=-1)

    tokens = exact[0].shape[:2].numel()
    totals = [0.0] * len(others)
    with bar("divergences", tokens) as advance:
        for start in range(0, tokens, _CHUNK):
            rows = slice(start, start + _CHUNK)
            original = log_likely(exact, rows)
            likely = original.exp().flatten()
            for number, other in enumerate(others):
                # in place: on a CPU fresh memory costs as much as the arithmetic
                apart = log_likely(other, rows).sub_(original).flatten()
                totals[number] -= torch.dot(likely, apart).item()
            advance(len(original))
    return [total / tokens for total in totals]
