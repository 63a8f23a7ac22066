"""Drafts: tokens that something cheap proposes and the model checks, several of them in one step.

Start at `Drafter`. A proposed token counts if it is the one that the model itself picks at that place, the
likeliest or the one that the request's seed draws (drawing.py), so the text is the one without drafts, and
the distribution the model's own. Speculative decoding: arXiv 2211.17192, with drafts that are drawn with
the model's own random numbers in place of its acceptance rule, so that a seed's text does not depend on
them. Prompt look-up: copying what followed the same words earlier.
"""

import time
from array import array
from dataclasses import replace
from typing import Protocol

import torch

from tinier.checkpoint import Checkpoint
from tinier.engine.blocks import BlockPool
from tinier.engine.config import EngineConfig
from tinier.engine.decoder import Decoder
from tinier.engine.pace import Pace
from tinier.engine.request import Request
from tinier.engine.runner import Output, Runner
from tinier.engine.sampler import Sampler
from tinier.engine.scheduler import Chunk
from tinier.families import open_model

PROMPT = "prompt"
"""EngineConfig.draft: no model, but PromptLookup"""
# tokens that must be the same for what followed them to be proposed: the more of them, the better
_LEAST_MATCHED, _MOST_MATCHED = 2, 4
_BYTES = 4


def draft_model(config: EngineConfig) -> Checkpoint | None:
    """What config.draft names, if it is a model."""
    return None if config.draft in (None, PROMPT) else open_model(config.draft)


class Drafter(Protocol):
    """Proposes tokens. Every process of a shared model is told what the first one's drafter proposed."""

    def propose(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        """At most so many tokens for each request, all of whose tokens are known; requests without a
        proposal may be left out."""
        ...

    def unread(self, request: Request) -> int | None:
        """Tokens of a request that must be read before anything is proposed; None: nothing can be."""
        ...

    def forget(self) -> None:
        """Drop what is kept about all requests."""
        ...


class PromptLookup:
    """Proposes what followed the last few tokens where they stood before, in the prompt or the output."""

    def __init__(self) -> None:
        self._texts: dict[Request, bytearray] = {}
        """Known tokens, four bytes each: there is nothing faster to look through for a few of them"""

    def propose(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        self._texts = {r: text for r, text in self._texts.items() if r.seat is not None}
        found = {}
        for request, most in wanted.items():
            if tokens := continuation(self._text(request), most):
                found[request] = tokens
        return found

    def _text(self, request: Request) -> bytearray:
        """All that is known of it."""
        text = self._texts.setdefault(request, bytearray())
        known = len(text) // _BYTES
        text += array("I", request.tokens(known, request.num_known - known)).tobytes()
        return text

    def unread(self, request: Request) -> int | None:
        # a step in flight is not waited for where nothing repeats
        return 0 if continuation(self._text(request), 1) else None

    def forget(self) -> None:
        self._texts.clear()


def continuation(text: bytearray, most: int) -> list[int]:
    """What came after the last few tokens before, the more of them are the same and the later the better;
    past the end of the text that goes on as it began. Empty: they were not there before.

    text: tokens of four bytes each.
    """
    start = -1
    for count in range(_LEAST_MATCHED, _MOST_MATCHED + 1):
        found = _follows(text, count)
        if found < 0:
            break
        start = found
    if start < 0:
        return []
    followed = array("I", bytes(text[start : start + _BYTES * most])).tolist()
    return (followed * -(-most // len(followed)))[:most]


def _follows(text: bytearray, count: int) -> int:
    """Where the token after the last `count` tokens is, where they stood before; -1: nowhere."""
    size = _BYTES * count
    last, end = text[-size:], len(text) - _BYTES
    if end < size:
        return -1
    at = text.rfind(last, 0, end)
    while at > 0 and at % _BYTES:  # parts of other tokens
        at = text.rfind(last, 0, at + size - 1)
    return -1 if at < 0 else at + size


class DraftModel:
    """Proposes what a smaller model writes. It reads the same tokens and has a cache of its own."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        max_seq_len: int,
        num_blocks: int,
        vocab: int,
        pace: Pace,
    ) -> None:
        """num_blocks: as many as the model itself has, of as many tokens. vocab: of the model. pace: is
        told what drafting takes."""
        self.decoder = decoder
        self._vocab, self._pace = vocab, pace
        self._longest = min(max_seq_len, decoder.geometry.max_positions)
        self._config = config
        self._num_blocks = num_blocks
        self.runner = Runner(
            decoder, num_blocks, config.block_size, config.max_batch_size, self._longest,
            config.max_step_tokens,
        )  # fmt: skip
        self.forget()

    def forget(self) -> None:
        self._pool = BlockPool(self._num_blocks, self._config.block_size)
        self._sampler = Sampler(self.decoder.geometry.vocab, self.decoder.device)
        self._copies: dict[Request, Request] = {}

    def propose(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        for request in [r for r in self._copies if r.seat is None]:
            self._drop(request)
        found: dict[Request, list[int]] = {}
        left = {}
        for request, most in wanted.items():
            if self.unread(request) is not None:
                left[request] = min(most, self._longest - request.num_known)
                found[request] = []
        for request in left:
            self._follow(request)
        while left:
            started = time.perf_counter()
            unread = sum(_uncomputed(self._copies[request]) for request in left)
            reads = unread > 2 * len(left)
            proposed = self._next(list(left))
            seconds = time.perf_counter() - started
            if reads:
                self._pace.reading_took(seconds, unread)
            else:
                self._pace.drafting_took(seconds, len(left))
            for request, token in proposed:
                if token is not None:
                    found[request].append(token)
                    self._copies[request].draft.append(token)
                    left[request] -= 1
                ends = token is None or token in request.params.stop_token_ids
                if ends or not left[request]:
                    del left[request]
        return found

    def unread(self, request: Request) -> int | None:
        copy, known = self._copies.get(request), self.decoder.geometry.vocab
        if request.num_tokens >= self._longest:
            return None
        if known < self._vocab and max(request.prompt + request.output) >= known:
            return None
        return request.num_tokens - (copy.num_computed if copy else 0)

    def _follow(self, request: Request) -> None:
        """Bring the copy of a request to the tokens that it has by now."""
        copy = self._copies.get(request)
        if copy is None:
            vocab = self.decoder.geometry.vocab
            params = replace(
                request.params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
                logprobs=None, prompt_logprobs=None, prompt_logits=False, pooling=None, grammar=None,
                stop=(),
                logit_bias={t: b for t, b in dict(request.params.logit_bias).items() if t < vocab},
            )  # fmt: skip
            copy = Request(
                request.number, request.prompt, params, request.arrived, self.runner.width
            )
            copy.output = list(request.output)
            copy.num_computed = self._pool.reuse(copy) if self._config.reuse_prefixes else 0
            self._copies[request] = copy
        copy.seat = request.seat
        new = request.output[len(copy.output) :]
        right = 0
        while right < min(len(copy.draft), len(new)) and copy.draft[right] == new[right]:
            right += 1
        copy.num_computed = min(copy.num_computed, copy.num_known + right)
        copy.output += new
        copy.draft = []
        copy.num_computed = min(copy.num_computed, copy.num_known - 1)
        if self._config.reuse_prefixes:
            self._pool.remember(copy)

    def _next(self, requests: list[Request]) -> list[tuple[Request, int | None]]:
        """The next token of each request's copy; None where there is no room for it."""
        waiting = {request: self._copies[request] for request in requests}
        found: list[tuple[Request, int | None]] = []
        while waiting:
            chunks, budget = {}, self._config.max_step_tokens
            for request, copy in list(waiting.items()):
                count = min(budget, _uncomputed(copy))
                if count and not self._pool.extend(copy, copy.num_computed + count):
                    del waiting[request]
                    self._drop(request)
                    found.append((request, None))
                elif count:
                    chunks[request] = Chunk(copy, copy.num_computed, count)
                    budget -= count
            if not chunks:
                break
            ordered = sorted(chunks, key=lambda request: chunks[request].count > 1)
            output = self.runner.run([chunks[request] for request in ordered])
            for request in ordered:
                copy = waiting[request]
                copy.num_computed += chunks[request].count
            ends = [i for i, request in enumerate(ordered) if not _uncomputed(waiting[request])]
            done = [ordered[i] for i in ends]
            tokens = self._picked(output, ends, [waiting[request] for request in done])
            for request, token in zip(done, tokens, strict=True):
                del waiting[request]
                found.append((request, token if 0 <= token < self._vocab else None))
        return found

    @torch.inference_mode()
    def _picked(self, output: Output, rows: list[int], copies: list[Request]) -> list[int]:
        if not copies:
            return []
        logits, tokens = self.runner.rows(output, rows)
        if not all(copy.params.plain for copy in copies):
            positions = [len(copy.output) + len(copy.draft) for copy in copies]
            tokens = self._sampler.sample(logits, copies, positions).tokens
        picked: list[int] = tokens.tolist()
        return picked

    def _drop(self, request: Request) -> None:
        copy = self._copies.pop(request)
        self._pool.release(copy)
        self._sampler.forget(copy)


def _uncomputed(copy: Request) -> int:
    """Tokens of it, with its draft, whose keys and values are not in the cache."""
    return copy.num_known + len(copy.draft) - copy.num_computed
