"""Picks the next token of each request from the logits, on the device and without waiting for it.

Start at `Sampler.sample`. What a row of the batch goes through, in this order: logit_bias and the tokens
that min_tokens forbids, penalties (penalties.py), then the most likely token, or temperature, min_p,
top_k, top_p and a draw (drawing.py). Rows that need less pay less: a greedy one is an argmax. What can
be known beforehand is kept in a plan as long as the batch stays the same.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinier.device import upload
from tinier.engine.drawing import Limits, draw, keys
from tinier.engine.grammar import forbidden
from tinier.engine.penalties import Penalties, Strengths
from tinier.engine.request import Request
from tinier.kernels import drawn, uses_triton
from tinier.kernels.reference import greedy

# logits that are drawn from at once: 55 bytes of working memory each with all limits
_DRAWN_AT_ONCE = 2**23

Kind = tuple[bool, bool, bool] | None
"""Whether a row has a min_p, a top_k, a top_p; None: it is greedy."""


class Sampled(NamedTuple):
    tokens: Tensor
    """[B] int64, on the logits' device; -1 where the logits are no numbers"""
    logprobs: Tensor | None
    """[B] float32 of the tokens, if any request asked; nan for those that did not"""
    top_logprobs: Tensor | None
    """[B, n] float32, most likely first; n: the most that any request asked"""
    top_tokens: Tensor | None
    """[B, n] int64"""


class Group(NamedTuple):
    """Rows [start, end) of the busy ones, which are picked alike."""

    start: int
    end: int
    limits: Limits | None
    """None: greedy"""


class Penalized(NamedTuple):
    """The requests with penalties, and their rows, [P] each."""

    requests: list[Request]
    batch_rows: list[int]
    busy_rows: Tensor
    """Among the busy ones"""
    table_rows: Tensor
    """In the tables of penalties.py"""
    strengths: Strengths


@dataclass(slots=True)
class Plan:
    """All about one list of requests that stays the same from step to step.

    The busy rows are those that need more than an argmax, sorted by kind.
    """

    requests: list[Request]
    early: list[tuple[int, int, bool]]
    """Rows with min_tokens, those, and whether they forbid something now."""
    busy: list[int] = field(default_factory=list)
    busy_rows: Tensor | None = None
    """The same on the device; None: all rows in order."""
    groups: list[Group] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    """Busy rows that are drawn: the last ones."""
    seeds: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Theirs."""
    changes: tuple[Tensor, Tensor] | None = None
    """Where among the busy rows' logits something is added, and what."""
    penalized: Penalized | None = None
    temperatures: Tensor | None = None
    """[B, 1] where all rows are drawn by them alone and there is a kernel for it."""
    scored: list[int] = field(default_factory=list)
    """Rows whose log-probabilities are asked for."""
    scored_rows: Tensor | None = None
    most: int = 0
    """Alternatives that any request asked for."""

    def fits(self, requests: list[Request], positions: list[int]) -> bool:
        return self.requests == requests and all(
            (positions[row] < least) == active for row, least, active in self.early
        )


class Sampler:
    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._penalties = Penalties(vocab, device)
        self._plan: Plan | None = None

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, requests: list[Request], positions: list[int],
        allowed: Tensor | None = None,
    ) -> Sampled:  # fmt: skip
        """One token for each request.

        logits: [B, vocab], left as they are; positions: how many output tokens each request has had
        before this one, those that are still on the device counted; allowed: the tokens that may come, as
        Grammars.allowed gives them, None: all. A request's token depends on its own logits, parameters,
        tokens and position, never on the rest of the batch. Log-probabilities are of all tokens.
        """
        plan = self._plan
        if plan is None or not plan.fits(requests, positions):
            plan = self._plan = self._make_plan(requests, positions)
        if plan.temperatures is not None:
            tokens = drawn(logits, plan.temperatures, self._keys(plan, positions), allowed)
        else:
            tokens = self._tokens(logits, plan, positions, allowed)
        if not plan.scored:
            return Sampled(tokens, None, None, None)
        return Sampled(tokens, *_scores(logits, tokens.clamp(min=0), plan))

    def _tokens(
        self, logits: Tensor, plan: Plan, positions: list[int], allowed: Tensor | None
    ) -> Tensor:
        """A token of each row, kind by kind."""
        tokens = likeliest = greedy(logits)
        among = logits
        if allowed is not None:
            left_out = forbidden(allowed, self._vocab)
            among = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
            if len(plan.busy) < len(plan.requests):
                likeliest = torch.where(likeliest < 0, -1, among.argmax(dim=-1))
            tokens = likeliest
        if plan.busy:
            tokens = chosen = self._pick(among, plan, positions)
            if plan.busy_rows is not None:
                tokens = likeliest.index_copy(0, plan.busy_rows, chosen)
            tokens = torch.where(likeliest < 0, -1, tokens)
        return tokens

    def forget(self, request: Request) -> None:
        """Drop what is kept about a request: it is done."""
        self._penalties.forget(request)
        if self._plan is not None and request in self._plan.requests:
            self._plan = None

    def _pick(self, logits: Tensor, plan: Plan, positions: list[int]) -> Tensor:
        """The tokens of the busy rows, which are noted where penalties count them."""
        if plan.busy_rows is not None:
            logits = logits.index_select(0, plan.busy_rows)
        logits = logits.float()
        if plan.changes is not None:
            where, what = plan.changes
            logits = logits.reshape(-1).scatter_add(0, where, what).view_as(logits)
        penalized = plan.penalized
        if penalized is None:
            return self._choose(logits, plan, positions)
        rows = penalized.busy_rows
        for request, row in zip(penalized.requests, penalized.batch_rows, strict=True):
            self._penalties.row(request, positions[row])  # all its tokens are counted
        changed = self._penalties.apply(
            logits.index_select(0, rows), penalized.table_rows, penalized.strengths
        )
        tokens = self._choose(logits.index_copy(0, rows, changed), plan, positions)
        self._penalties.count(
            penalized.requests, penalized.table_rows, tokens.index_select(0, rows)
        )
        return tokens

    def _choose(self, logits: Tensor, plan: Plan, positions: list[int]) -> Tensor:
        """The tokens of the busy rows, from their final logits."""
        row_keys = self._keys(plan, positions) if plan.drawn else None
        tokens = []
        first = len(plan.busy) - len(plan.drawn)
        for start, end, limits in plan.groups:
            if limits is None or row_keys is None:
                tokens.append(logits[start:end].argmax(dim=-1))
            else:
                tokens.append(
                    draw(logits[start:end], limits, row_keys[start - first : end - first])
                )
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def _keys(self, plan: Plan, positions: list[int]) -> Tensor:
        """For the drawn rows, [D, 2]."""
        at = np.array([positions[row] for row in plan.drawn], dtype=np.uint64)
        return self._upload(keys(plan.seeds, at), torch.int32)

    def _make_plan(self, requests: list[Request], positions: list[int]) -> Plan:
        early = [
            (row, request.params.min_tokens, positions[row] < request.params.min_tokens)
            for row, request in enumerate(requests)
            if request.params.min_tokens
        ]
        plan = Plan(list(requests), early)
        changes = {
            row: change
            for row, request in enumerate(requests)
            if (change := self._changes(request, positions[row]))
        }
        self._group(plan, changes)
        if changes:
            self._place_changes(plan, changes)
        self._place_penalties(plan, positions)
        limits = [group.limits for group in plan.groups if group.limits is not None]
        by_temperature = len(plan.drawn) == len(requests) and all(
            one.by_temperature for one in limits
        )
        if uses_triton(self._device) and by_temperature and not (changes or plan.penalized):
            # one kind, whose rows `_group` leaves in order, as `_keys` has them
            plan.temperatures = torch.cat([one.temperature for one in limits])
        plan.scored = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        if plan.scored:
            plan.most = max(requests[i].params.logprobs or 0 for i in plan.scored)
            if len(plan.scored) < len(requests):
                plan.scored_rows = self._upload(plan.scored, torch.int64)
        return plan

    def _changes(self, request: Request, position: int) -> dict[int, float]:
        """What is added to the request's logits."""
        params = request.params
        if not (params.logit_bias or params.min_tokens):
            return {}
        changes = dict(params.logit_bias)
        if position < params.min_tokens:
            # a stop token may be one that the tokenizer has and the model has not
            known = (token for token in params.stop_token_ids if token < self._vocab)
            changes |= dict.fromkeys(known, -torch.inf)
        return changes

    def _group(self, plan: Plan, changes: dict[int, dict[int, float]]) -> None:
        """Find the busy rows, the greedy ones first, and group them by kind."""
        rows_of: dict[Kind, list[int]] = defaultdict(list)
        for row, request in enumerate(plan.requests):
            params = request.params
            if params.temperature > 0:
                truncates = 0 < params.top_k < self._vocab
                rows_of[params.min_p > 0, truncates, params.top_p < 1].append(row)
            elif params.penalized or row in changes:
                rows_of[None].append(row)
        at_once = max(1, _DRAWN_AT_ONCE // self._vocab)
        for kind, rows in sorted(rows_of.items(), key=lambda item: item[0] or ()):
            for i in range(0, len(rows), at_once):
                part = rows[i : i + at_once]
                limits = None if kind is None else self._limits(plan, part, kind)
                start = len(plan.busy)
                plan.groups.append(Group(start, start + len(part), limits))
                plan.busy += part
        plan.drawn = plan.busy[len(rows_of.get(None, ())) :]
        seeds = [plan.requests[row].params.seed % 2**64 for row in plan.drawn]
        plan.seeds = np.array(seeds, dtype=np.uint64)
        if plan.busy and plan.busy != list(range(len(plan.requests))):
            plan.busy_rows = self._upload(plan.busy, torch.int64)

    def _limits(self, plan: Plan, rows: list[int], kind: tuple[bool, bool, bool]) -> Limits:
        params = [plan.requests[row].params for row in rows]
        has_min_p, has_top_k, has_top_p = kind

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return self._upload(values, dtype).unsqueeze(1)

        return Limits(
            # below this every other token's weight is 0 anyway, and float32 has no 1e-50
            column([max(p.temperature, 1e-9) for p in params]),
            column([p.min_p for p in params]) if has_min_p else None,
            column([p.top_k for p in params], torch.int64) if has_top_k else None,
            column([p.top_p for p in params], torch.float64) if has_top_p else None,
        )

    def _place_changes(self, plan: Plan, changes: dict[int, dict[int, float]]) -> None:
        places = [
            (at * self._vocab + token, value)
            for at, row in enumerate(plan.busy)
            for token, value in changes.get(row, {}).items()
        ]
        where, what = zip(*places, strict=True)
        plan.changes = (self._upload(where, torch.int64), self._upload(what, torch.float32))

    def _place_penalties(self, plan: Plan, positions: list[int]) -> None:
        places = [
            (at, row) for at, row in enumerate(plan.busy) if plan.requests[row].params.penalized
        ]
        if not places:
            return
        requests = [plan.requests[row] for _, row in places]
        tables = [self._penalties.row(plan.requests[row], positions[row]) for _, row in places]

        def column(values: list[float]) -> Tensor:
            return self._upload(values, torch.float32).unsqueeze(1)

        plan.penalized = Penalized(
            requests,
            [row for _, row in places],
            self._upload([at for at, _ in places], torch.int64),
            self._upload(tables, torch.int64),
            Strengths(
                column([r.params.repetition_penalty for r in requests]),
                column([r.params.presence_penalty for r in requests]),
                column([r.params.frequency_penalty for r in requests]),
            ),
        )

    def _upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        return upload(values, dtype, self._device)


def scores(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens [N] under logits [N, vocab], and the `most` likely tokens'.

    Returns logprobs [N], top_logprobs [N, most] and top_tokens [N, most], most likely first.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), top.values, top.indices


def _scores(
    logits: Tensor, tokens: Tensor, plan: Plan
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the rows that are asked for; the others' are nan, and their top tokens -1."""
    if not plan.scored:
        return None, None, None
    rows = plan.scored_rows
    if rows is None:
        return scores(logits, tokens, plan.most)
    some = scores(logits.index_select(0, rows), tokens.index_select(0, rows), plan.most)
    logprobs, top_logprobs, top_tokens = (
        part.new_full((len(tokens), *part.shape[1:]), -1 if part.dtype == torch.int64 else torch.nan)
        .index_copy_(0, rows, part)
        for part in some
    )  # fmt: skip
    return logprobs, top_logprobs, top_tokens
