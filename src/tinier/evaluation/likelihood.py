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
    found: list[Score | None] = [None] * len(pairs)
    order = sorted(rows, key=len, reverse=True)
    with bar(label, len(pairs)) as advance:
        for batch in _batches(order):
            longest = len(batch[0])
            windows = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
            # causal: what follows a row's last token cannot change what stands before it
            for states, row in zip(decoder.hidden_states(windows), batch, strict=True):
                targets = [pairs[i][1] for i in rows[row]]
                scores = _scores(decoder, states[: len(row)], targets)
                for i, score in zip(rows[row], scores, strict=True):
                    found[i] = score
                advance(len(targets))
    return [score for score in found if score is not None]


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
def _scores(decoder: Decoder, states: Tensor, targets: Sequence[list[int]]) -> list[Score]:
    """states: [T, hidden]. targets: continuations of one length, equal but for the last token, which stands
    one behind the last state."""
    count = len(targets[0])
    wanted = torch.tensor(targets, device=states.device)  # [targets, count]
    sums = torch.zeros(len(targets), dtype=torch.float64, device=states.device)
    greedy = torch.ones(len(targets), dtype=torch.bool, device=states.device)
    own = states[len(states) - count :]
    for start in range(0, count, _CHUNK_TOKENS):
        logits = decoder.logits_float32(own[start : start + _CHUNK_TOKENS])
        tokens = wanted[:, start : start + _CHUNK_TOKENS]
        logprobs = torch.log_softmax(logits, dim=-1).expand(len(targets), -1, -1)
        sums += logprobs.gather(2, tokens.unsqueeze(2)).squeeze(2).double().sum(1)
        greedy &= (logits.argmax(-1) == tokens).all(1)
    return [Score(float(total), bool(same)) for total, same in zip(sums, greedy, strict=True)]
