"""Texts that follow a grammar: JSON schemas, regular expressions, choices. Through llguidance (MIT).

Start at `json_schema`, `regex` and `choice`, which give a grammar as SamplingParams takes it, and
`Grammars`, which an engine has: before each token a matcher says which ones may come.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinier.device import Staging
from tinier.errors import InputError
from tinier.tokenizer import Tokenizer

# room for a line's indentation; without a limit a small model may write white space for ever
JSON_SPACING: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A]{1,32}"}

# from so many matchers on, threads take less time than one after the other (docs/log.md)
_FEW = 8
# more than a process's own cores fight for them
_THREADS = 16

Matcher = Any
"""llguidance.LLMatcher: where a text stands in its grammar"""


def json_schema(schema: dict[str, Any] | str) -> str:
    """The grammar of a JSON schema's instances; {"type": "object"} is any object. Raises InputError."""
    try:
        grammar: str = _library().LLMatcher.grammar_from_json_schema(schema, JSON_SPACING)
    except ValueError as error:
        raise InputError(f"this is no JSON schema: {error}.") from None
    return _checked(grammar, "schema")


def regex(pattern: str) -> str:
    """The grammar of texts that a regular expression (Rust's syntax) matches whole. Raises InputError."""
    return _checked(_library().LLMatcher.grammar_from_regex(pattern), "regular expression")


def choice(texts: Sequence[str]) -> str:
    """The grammar of a few texts. Raises InputError."""
    if not texts or not all(texts):
        raise InputError("a choice needs texts that are not empty. Give at least one.")
    rule = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return _checked(_library().LLMatcher.grammar_from_lark(rule), "choice")


def lark(text: str) -> str:
    """A grammar in Lark's syntax, or llguidance's own JSON. Raises InputError."""
    is_json = text.lstrip().startswith("{")
    return _checked(text if is_json else _library().LLMatcher.grammar_from_lark(text), "grammar")


def _checked(grammar: str, what: str) -> str:
    """The grammar. Raises InputError for one that cannot be followed, with the reason."""
    failed, said = _library().LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        reason = " ".join(said[0].split())
        raise InputError(f"this {what} cannot be followed: {reason:.300}")
    return grammar


def _library() -> Any:
    """llguidance, imported where a grammar is asked for: it takes transformers along."""
    try:
        import llguidance.hf
    except ImportError:
        raise InputError(
            "texts that follow a grammar need llguidance. Type: pip install llguidance"
        ) from None
    return llguidance


class Grammars:
    """The matchers of one engine's requests, which share what they know about the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, device: torch.device) -> None:
        self._tokenizer, self._vocab, self._device = tokenizer, vocab, device
        self._known: dict[tuple[int, ...], Any] = {}
        self._threads = _library().LLExecutor(min(_THREADS, torch.get_num_threads()))
        self._staging = Staging()

    def matcher(self, grammar: str, ends: tuple[int, ...]) -> Matcher:
        """At the start of a text. ends: tokens that end it, allowed where the grammar is satisfied.

        Raises InputError for a grammar that cannot be followed.
        """
        if ends not in self._known:
            self._known[ends] = _library().hf.from_tokenizer(
                self._tokenizer.inner, n_vocab=max(self._vocab, len(self._tokenizer)),
                eos_token=list(ends) or None,
            )  # fmt: skip
        found = _library().LLMatcher(self._known[ends], grammar)
        if found.is_error():
            raise InputError(f"this grammar cannot be followed: {found.get_error():.300}")
        return found

    def follow(self, tokens: list[tuple[Matcher, int]]) -> None:
        """Each matcher's text goes on by a token; one that the grammar forbids makes it an error."""
        if len(tokens) < _FEW:
            for matcher, token in tokens:
                matcher.consume_token(token)
        else:
            self._threads.consume_token_par(tokens)

    def allowed(self, matchers: Sequence[Matcher]) -> Tensor:
        """A bit for each token that may come next, the lowest first: [n, words] int32 on the device."""
        words = -(-max(self._vocab, len(self._tokenizer)) // 32)
        on_gpu = self._device.type == "cuda"
        size = len(matchers) * words
        room = self._staging.room(size) if on_gpu else torch.empty(size, dtype=torch.int32)
        bits = room.numpy().reshape(len(matchers), words)
        if len(matchers) < _FEW:
            for row, matcher in zip(bits, matchers, strict=True):
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        else:
            rows = [(matcher, row) for row, matcher in enumerate(matchers)]
            self._threads.unsafe_compute_mask_ptr(rows, bits.ctypes.data, 4 * words, len(rows))
        packed = room.view(len(matchers), words)
        if on_gpu:  # nobody waits for the step
            packed = packed.to(self._device, non_blocking=True)
            self._staging.sent()
        return packed


def forbidden(allowed: Tensor, vocab: int) -> Tensor:
    """What `Grammars.allowed` leaves out: [n, vocab] bool."""
    if allowed.device.type == "cpu":
        bits = np.invert(allowed.numpy()).view(np.uint8)
        unpacked = np.unpackbits(bits, axis=1, bitorder="little")
        return torch.from_numpy(unpacked.view(np.bool_)[:, :vocab])
    return spread(allowed)[:, :vocab]


def spread(allowed: Tensor) -> Tensor:
    """The same by operators of any device: [n, 32 · words] bool."""
    places = torch.arange(32, device=allowed.device, dtype=torch.int32)
    left_out: Tensor = (allowed.unsqueeze(-1) >> places) & 1 == 0
    return left_out.flatten(1)
