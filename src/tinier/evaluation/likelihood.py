"""How likely a model finds continuations of a context. Start at `score_continuations`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.engine import Decoder
from tinier.progress import bar

_BATCH_TOKENS = 4096
_CHUNK_TOKENS = 256


class Score(NamedTuple):
    logprob: float
    """Of the continuation behind its context, in nats"""
    greedy: bool
    """Whether the continuation is what greedy decoding would write"""


def score_continuations(
    decoder: Decoder, pairs: Sequence[tuple[list[int], list[int]]], label: str
) -> list[Score]:
    """Of each pair of context and continuation, both token ids and neither empty.

    Logits are multiplied out in float32. Pairs that differ in their last token alone share one pass.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        rows.setdefault((*context, *continuation[:-1]), []).append(index)
    found = [Score(0.0, False)] * len(pairs)
    order = sorted(rows, key=len, reverse=True)
    with bar(label, len(pairs)) as advance:
        for batch in _batches(order):
            longest = len(batch[0])
            windows = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
            # causal: what follows a row's last token cannot change what stands before it
            hidden = decoder.hidden_states(windows)
            asked = [(place, i) for place, row in enumerate(batch) for i in rows[row]]
            wanted = [
                _Wanted(place * longest + len(batch[place]) - len(pairs[i][1]), pairs[i][1])
                for place, i in asked
            ]
            scores = _scores(decoder, hidden.flatten(0, 1), wanted)
            for (_, i), score in zip(asked, scores, strict=True):
                found[i] = score
            advance(len(asked))
    return found


class _Wanted(NamedTuple):
    first: int
    """The position whose prediction the first token is"""
    tokens: list[int]


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Rows, the longest first, in batches of at most _BATCH_TOKENS tokens with their padding."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _scores(decoder: Decoder, states: Tensor, wanted: Sequence[_Wanted]) -> list[Score]:
    """states: [positions, hidden]. The score of each continuation."""
    device = states.device
    owner = torch.tensor([n for n, one in enumerate(wanted) for _ in one.tokens], device=device)
    place = torch.tensor([one.first + j for one in wanted for j in range(len(one.tokens))])
    token = torch.tensor([token for one in wanted for token in one.tokens], device=device)
    # continuations of one row have positions in common: each is multiplied out once
    places, which = place.to(device).unique(return_inverse=True)
    logprobs = torch.empty(len(token), dtype=torch.float64, device=device)
    likeliest = torch.empty(len(token), dtype=torch.bool, device=device)
    for start in range(0, len(places), _CHUNK_TOKENS):
        logits = decoder.logits_float32(states[places[start : start + _CHUNK_TOKENS]])
        here = ((which >= start) & (which < start + len(logits))).nonzero().squeeze(1)
        row, own = which[here] - start, token[here]
        logprobs[here] = torch.log_softmax(logits, dim=-1)[row, own].double()
        likeliest[here] = logits.argmax(dim=-1)[row] == own
    sums = torch.zeros(len(wanted), dtype=torch.float64, device=device)
    sums.index_add_(0, owner, logprobs)
    missed = torch.zeros(len(wanted), device=device).index_add_(0, owner, (~likeliest).float())
    return [
        Score(total, not misses)
        for total, misses in zip(sums.tolist(), missed.tolist(), strict=True)
    ]
