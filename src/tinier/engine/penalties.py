"""Repetition, presence and frequency penalties: which tokens a request has had, kept on the device.

A request has a row of two tables from its first penalized sample until it is forgotten. The host never
reads them, so a token counts as soon as it is sampled, before the host knows it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinier.engine.request import Request


class Strengths(NamedTuple):
    """[P, 1] float32 each, as in SamplingParams."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


class Penalties:
    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._counts = torch.zeros(0, vocab, dtype=torch.int32, device=device)
        """How often each token is in the output"""
        self._seen = torch.zeros(0, vocab, dtype=torch.bool, device=device)
        """Whether it is in the prompt or the output"""
        self._free: list[int] = []
        self._rows: dict[Request, int] = {}
        self._lengths: dict[Request, int] = {}
        """Output tokens that are counted"""

    def row(self, request: Request, position: int) -> int:
        """The request's row of the tables, with all its `position` output tokens counted."""
        if self._lengths.get(request) != position:
            assert len(request.output) == position, "an output token was not sampled here"
            self._fill(request)
        return self._rows[request]

    def forget(self, request: Request) -> None:
        row = self._rows.pop(request, None)
        if row is not None:
            del self._lengths[request]
            self._free.append(row)

    def apply(self, logits: Tensor, rows: Tensor, strengths: Strengths) -> Tensor:
        """Logits [P, vocab] with the penalties of table rows [P] taken off."""
        divided = torch.where(
            logits > 0, logits / strengths.repetition, logits * strengths.repetition
        )
        logits = torch.where(self._seen.index_select(0, rows), divided, logits)
        counts = self._counts.index_select(0, rows)
        return logits - strengths.frequency * counts - strengths.presence * (counts > 0)

    def count(self, requests: list[Request], rows: Tensor, tokens: Tensor) -> None:
        """Note the tokens [P] that the requests, of table rows [P], got."""
        flat = rows * self._vocab + tokens
        ones = torch.ones_like(flat, dtype=torch.int32)
        self._counts.view(-1).scatter_add_(0, flat, ones)  # a request is there once: no collisions
        self._seen.view(-1).index_fill_(0, flat, True)
        for request in requests:
            self._lengths[request] += 1

    def _fill(self, request: Request) -> None:
        if request not in self._rows:
            if not self._free:
                self._grow()
            self._rows[request] = self._free.pop()
        row = self._rows[request]
        self._lengths[request] = len(request.output)
        tokens = self._upload(request.prompt + request.output)
        self._seen[row].zero_().index_fill_(0, tokens, True)
        output = tokens[len(request.prompt) :]
        ones = torch.ones_like(output, dtype=torch.int32)
        self._counts[row].zero_().scatter_add_(0, output, ones)

    def _grow(self) -> None:
        old = len(self._counts)
        more = max(4, old)
        self._free = list(range(old + more - 1, old - 1, -1))
        self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._vocab)])
        self._seen = torch.cat([self._seen, self._seen.new_zeros(more, self._vocab)])

    def _upload(self, tokens: list[int]) -> Tensor:
        host = torch.tensor(tokens, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)
