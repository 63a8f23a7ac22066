"""One user's request: its prompt, how to sample, what has been computed, and when."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinier.engine.grammar import Matcher
from tinier.engine.text import TextStream
from tinier.errors import InputError

MAX_LOGPROBS = 20
MAX_STOPS = 128

Check = tuple[str, bool, str]
"""A field, whether its value fits, and what would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    max_tokens: int = 128
    """Output tokens at most."""
    min_tokens: int = 0
    """Output tokens before which none of `stop_token_ids` is sampled and no string of `stop` counts."""
    temperature: float = 0.0
    """0: greedy, the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among the tokens that are at least this share as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Logits of the prompt's and the output's tokens are divided by this if positive, else multiplied
    (arXiv 1909.05858); 1: none."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that is in the output."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that it is in the output."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens, as {token: bias}. It is kept as sorted pairs."""
    seed: int = 0
    """Equal seeds draw equal numbers, whatever else is in the batch. The text is equal where the logits
    are: for equal requests in equal batches. On a CPU decode steps of the native kernel do not depend on
    the batch, but a prompt's products do, by their last bit, on what shares its step and on how much of it
    was cached; on a GPU a product's parts depend on the number of tokens (docs/design.md, decision 20)."""
    n: int = 1
    """Outputs for one prompt."""
    adapter: int = 0
    """Which of EngineConfig.adapters, from 1; 0: the model as it is."""
    logprobs: int | None = None
    """Give each output token's log-probability, and this many of the most likely tokens'."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    prompt_logits: bool = False
    """Give the logits at every position of the prompt."""
    grammar: str | None = None
    """What the output must follow, of `json_schema`, `regex`, `choice` or `lark` (grammar.py)."""
    pooling: Literal["mean", "last"] | None = None
    """Give the prompt's hidden states after the final norm: their mean over its tokens, or the last one."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of it. One that is a special token's ends it there."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output; they are not part of it."""
    skip_special_tokens: bool = True
    """The text that `stop` is looked for in has no special tokens."""

    def __post_init__(self) -> None:
        pairs = tuple(sorted(dict(self.logit_bias).items()))
        object.__setattr__(self, "logit_bias", pairs)
        for name, fits, allowed in (*self._checks(), *self._list_checks()):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)!r}. Use {allowed}.")

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def plain(self) -> bool:
        """Whether the next token is the most likely one, and nothing else is asked for."""
        return (
            self.temperature == 0
            and not self.penalized
            and not self.logit_bias
            and not self.min_tokens
            and self.logprobs is None
            and self.grammar is None
        )

    def check_vocab(self, vocab: int) -> None:
        """Raises InputError if a biased token is not one of a model with `vocab` tokens."""
        outside = [token for token in dict(self.logit_bias) if token >= vocab]
        if outside:
            raise InputError(f"logit_bias has ids outside 0..{vocab - 1}: {outside[:5]}.")

    def _checks(self) -> Iterator[Check]:
        yield "max_tokens", self.max_tokens >= 1, "1 or more"
        fits = 0 <= self.min_tokens <= self.max_tokens
        yield "min_tokens", fits, f"0 to max_tokens ({self.max_tokens})"
        yield "temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"
        yield "top_k", self.top_k >= 0, "0 (all tokens) or more"
        yield "top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"
        yield "min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1"
        fits = 0 < self.repetition_penalty < math.inf
        yield "repetition_penalty", fits, "more than 0; 1 is none"
        yield "presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2; 0 is none"
        yield "frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2; 0 is none"
        yield "pooling", self.pooling in (None, "mean", "last"), "mean or last"
        yield "n", 1 <= self.n <= 128, "1 to 128"
        yield "adapter", self.adapter >= 0, "0 (none) or more"
        allowed = f"0 to {MAX_LOGPROBS}, or None for no log-probabilities"
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            yield name, value is None or 0 <= value <= MAX_LOGPROBS, allowed

    def _list_checks(self) -> Iterator[Check]:
        biases = dict(self.logit_bias).items()
        fits = all(token >= 0 and -100 <= bias <= 100 for token, bias in biases)
        yield "logit_bias", fits, "token ids with biases of -100 to 100"
        texts = isinstance(self.stop, tuple) and all(self.stop)
        allowed = f"a tuple of at most {MAX_STOPS} strings, none of them empty"
        yield "stop", texts and len(self.stop) <= MAX_STOPS, allowed
        fits = isinstance(self.stop_token_ids, tuple) and all(i >= 0 for i in self.stop_token_ids)
        yield "stop_token_ids", fits, "a tuple of token ids, 0 or more each"


class Limits(NamedTuple):
    """What an engine can take."""

    vocab: int
    """Tokens that the model knows"""
    max_input_len: int
    """Tokens of one prompt"""
    room: int
    """Tokens of one prompt and its output"""
    adapters: int = 0
    """How many there are"""

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises InputError for a request that the engine could never compute."""
        if not prompt:
            raise InputError("the prompt is empty. Give at least one token.")
        if params.adapter > self.adapters:
            raise InputError(f"adapter={params.adapter}: this engine has {self.adapters}.")
        if min(prompt) < 0 or max(prompt) >= self.vocab:
            raise InputError(f"the prompt has ids outside 0..{self.vocab - 1}.")
        if len(prompt) > self.max_input_len:
            raise InputError(
                f"the prompt has {len(prompt)} tokens; this engine takes {self.max_input_len}. "
                "Shorten it, or raise max_input_len."
            )
        total = len(prompt) + params.max_tokens
        if total > self.room:
            raise InputError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) need {total} "
                f"positions; this engine has {self.room}. Shorten one of them."
            )
        params.check_vocab(self.vocab)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, of the model's own distribution."""

    token: int
    logprob: float
    """Of `token`"""
    top: dict[int, float]
    """The likeliest tokens and theirs"""


@dataclass(slots=True, eq=False)
class Request:
    number: int
    """Of the engine's requests, from 1"""
    prompt: list[int]
    params: SamplingParams
    arrived: float
    """Seconds on the engine's clock (time.perf_counter)."""
    width: int = 0
    """Cache blocks at most."""
    stream: TextStream | None = None
    """The output as text, where stop strings are watched for."""
    matcher: Matcher | None = None
    """Where the output stands in its grammar."""
    output: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    """Tokens that may come next, which the step in hand checks (drafts.py)."""
    num_drafted: int = 0
    """Tokens that were checked, in all."""
    num_accepted: int = 0
    """Of those, the ones that were right."""
    num_pending: int = 0
    """Tokens that are sampled but not known yet: their step is still in flight."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each output token, where asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each prompt token but the first, where asked for."""
    pooled: Tensor | None = None
    """[hidden] float32: what `pooling` asks for, of as much of the prompt as is computed."""
    prompt_logits: list[Tensor] = field(default_factory=list)
    """[n, vocab] each, in order: of all prompt positions, where asked for."""
    blocks: list[int] = field(default_factory=list)
    """Its cache blocks, in order."""
    table: NDArray[np.int32] = field(init=False)
    """The same, [width], as the runner copies it."""
    seat: int | None = None
    """Its place among the running requests; None: it waits."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache, or will be when the steps in flight are done."""
    num_reused: int = 0
    """Of those, taken from earlier requests."""
    num_scored: int = 0
    """Prompt positions whose logits were handed out."""
    queued: bool = True
    """Whether the scheduler has it: it waits or runs."""
    num_remembered: int = 0
    """Full blocks that the pool knows; `prefix` is its number for them, from 1, and before the first of
    them what no two adapters share."""
    prefix: int = field(init=False)
    token_times: list[float] = field(default_factory=list)
    """When each output token was there."""
    finished: str | None = None
    """`stop`, `length`, `cancelled`, or `error` (the model's logits are no numbers) once it is done."""

    def __post_init__(self) -> None:
        self.prefix = -self.params.adapter
        self.table = np.zeros(self.width, dtype=np.int32)

    @property
    def num_known(self) -> int:
        """Tokens whose values are known."""
        return len(self.prompt) + len(self.output)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output) + self.num_pending

    @property
    def num_sampled(self) -> int:
        """Output tokens, the ones in flight counted."""
        return len(self.output) + self.num_pending

    @property
    def may_reuse(self) -> bool:
        """Whether known blocks may stand in for computing: not where every position's logits, or hidden
        states, are asked for."""
        params = self.params
        return (
            params.prompt_logprobs is None and not params.prompt_logits and params.pooling is None
        )

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` token ids of prompt, output and draft from position `start`."""
        end = start + count
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        known = self.prompt[start:] + self.output[max(0, start - split) : end - split]
        return known + self.draft[max(0, start - self.num_known) : max(0, end - self.num_known)]

    def pool(self, hidden: Tensor) -> None:
        """Take in hidden states [n, hidden] of the prompt's next tokens."""
        if self.params.pooling == "last" or self.pooled is None:
            self.pooled = torch.zeros_like(hidden[0])
        self.pooled += (
            hidden[-1] if self.params.pooling == "last" else hidden.sum(dim=0) / len(self.prompt)
        )

    def add_block(self, block: int) -> None:
        self.table[len(self.blocks)] = block
        self.blocks.append(block)

    def clear_blocks(self) -> None:
        self.blocks.clear()
        self.num_remembered, self.prefix = 0, -self.params.adapter
