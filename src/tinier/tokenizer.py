"""A model's tokenizer: text to token ids and back, whatever library and habits stand behind it.

Start at `load_tokenizer`. What the tokenizers library and chat templates raise comes out as TextError
here, ids that the model's embedding lacks are found before they reach it, and a text never ends with an
end token that the tokenizer would like to append.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

from jinja2 import TemplateError

from tinier.checkpoint import Checkpoint
from tinier.errors import CheckpointError, InputError, TextError
from tinier.families import geometry_of

_SENTENCEPIECE_SPACE = "\u2581"


class Tokenizer:
    """transformers' tokenizer `inner` of a model that knows `vocab` tokens (None: all that it gives)."""

    def __init__(self, inner: Any, vocab: int | None = None) -> None:
        self.inner = inner
        self.vocab = vocab

    def __len__(self) -> int:
        return len(self.inner)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Ids that it sets in front of every text: BOS, or nothing."""
        plain = self._ids("a", special=False)
        whole = self._ids("a", special=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
        return tuple(whole[:1]) if whole[:1] == [self.bos_token_id] else ()

    @property
    def bos_token(self) -> str | None:
        text: str | None = self.inner.bos_token
        return text

    @property
    def bos_token_id(self) -> int | None:
        token: int | None = self.inner.bos_token_id
        return token

    @property
    def eos_token_id(self) -> int | None:
        token: int | None = self.inner.eos_token_id
        return token

    @property
    def has_template(self) -> bool:
        """Whether conversations can be written with it."""
        return self.inner.chat_template is not None

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id, each with `content` and `special`."""
        added: dict[int, Any] = self.inner.added_tokens_decoder
        return added

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the tokens that are left out of the text, by their content."""
        return {t.content: i for i, t in self.added_tokens_decoder.items() if t.special}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: with what it sets in front; nothing is ever set behind.

        Raises TextError for a text that is no Unicode, or that has tokens which the model lacks.
        """
        ids = [*(self.prefix if special else ()), *self._ids(text, special=False)]
        self.check(ids)
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Raise TextError for ids that the model has no embedding of."""
        if self.vocab is not None and ids and max(ids) >= self.vocab:
            token = next(i for i in ids if i >= self.vocab)
            raise TextError(
                f"the text has token {token} ({self.inner.convert_ids_to_tokens(token)!r}), and the model "
                f"knows {self.vocab} tokens: its tokenizer is another model's, or was added to. Use the "
                "tokenizer that belongs to the model, or a text without this token."
            )

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, opens_reply: bool, continues: bool = False,
        variables: Mapping[str, Any] | None = None, tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:  # fmt: skip
        """A conversation as the model's template writes it, BOS included where it does.

        opens_reply: with the opening of the assistant's turn. continues: the last message is left open.
        variables: more of what the template knows, such as enable_thinking. tools: functions that the model
        may call, for templates that know them. Raises TextError.
        """
        if variables:
            taken = signature(self.inner.apply_chat_template).parameters
            for name in variables.keys() & taken:
                raise TextError(
                    f"{name!r} cannot be set as a variable of the chat template. Leave it out."
                )
        if not self.has_template:
            raise TextError(
                "the model has no chat template, and this is a conversation. Use a model that has one, or "
                "plain text."
            )
        try:
            text: str = self.inner.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=opens_reply,
                continue_final_message=continues,
                tokenize=False,
                **(variables or {}),
            )
        except Exception as error:  # a template is a program: it may raise anything
            # the template's own words are meant for the user; what else fails in it is not
            said = type(error) is TemplateError and error.message
            if continues and isinstance(error, ValueError):
                said = (
                    "it does not keep the last message as it was sent. If that has thoughts between tags, "
                    "send only what comes behind them"
                )
            told = " ".join(str(said or type(error).__name__).split())
            raise TextError(f"the chat template refuses this conversation: {told:.300}") from None
        return text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        text: str = self._decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @cached_property
    def _decode(self) -> Callable[..., str]:
        backend = getattr(self.inner, "backend_tokenizer", None)
        if backend is not None and type(backend.model).__name__ == "BPE":
            # what transformers calls, for servers thousands of times a second; it adds nothing for BPE
            decode: Callable[..., str] = backend.decode
            return decode
        return self.inner.decode  # type: ignore[no-any-return]

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, as UTF-8; part of a character for some.

        Ids past the vocabulary add nothing.
        """
        if token in self.added_tokens_decoder:
            return str(self.added_tokens_decoder[token].content).encode()
        piece = self.inner.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            if all(letter in _BYTES for letter in piece):
                return bytes(_BYTES[letter] for letter in piece)
            return str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return str(piece).replace(_SENTENCEPIECE_SPACE, " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self.inner, "backend_tokenizer", None)
        return backend is not None and '"ByteLevel"' in json.dumps(
            json.loads(backend.to_str()).get("decoder")
        )

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            ids: list[int] = self.inner(text, add_special_tokens=special, verbose=False)[
                "input_ids"
            ]
        except Exception as error:  # the library's own have no common class
            try:
                text.encode()
            except UnicodeEncodeError as broken:
                raise TextError(
                    f"the text has half a surrogate pair at character {broken.start}, which is no "
                    "Unicode. Remove it, or write the file anew as UTF-8."
                ) from None
            raise TextError(f"the tokenizer refuses the text: {error}") from None
        return ids


def load_tokenizer(checkpoint: Checkpoint, vocab: int | None = None) -> Tokenizer:
    """The checkpoint's tokenizer. vocab: tokens that may be used; None: all that the model knows.

    Raises CheckpointError where the folder has none that can be used.
    """
    try:
        inner = _tokenizer_class(checkpoint).from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare exceptions
        told = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder} has no usable tokenizer ({told:.300}). Put the model's "
            "tokenizer.json and tokenizer_config.json beside config.json."
        ) from None
    return Tokenizer(inner, vocab or geometry_of(checkpoint).vocab)


def _tokenizer_class(checkpoint: Checkpoint) -> Any:
    """transformers' class for it. AutoTokenizer imports the model's configuration, which takes a second:
    where the folder names the class of any tokenizer.json, it is taken."""
    import transformers

    path = checkpoint.folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    plain = isinstance(said, dict) and said.get("tokenizer_class") == "TokenizersBackend"
    return transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer


def check_same_tokens(one: Checkpoint, other: Checkpoint) -> int:
    """How many token ids two models have in common: the smaller vocabulary, where the models are padded
    to different sizes or one knows more tokens.

    Raises InputError unless every id that both know is the same token.
    """
    names = []
    for checkpoint in (one, other):
        vocabulary = load_tokenizer(checkpoint).inner.get_vocab()
        names.append({i: name for name, i in vocabulary.items()})
    common = min(geometry_of(one).vocab, geometry_of(other).vocab)
    for token in range(common):
        mine, theirs = (known.get(token) for known in names)
        if mine is not None and theirs is not None and mine != theirs:
            raise InputError(
                f"{one.folder.name} and {other.folder.name} have different tokenizers: token {token} is "
                f"{mine!r} in one and {theirs!r} in the other. Use models of the same family."
            )
    shared = sum(i < common for i in names[0].keys() & names[1].keys())
    if 2 * shared < max(len(known) for known in names):
        raise InputError(
            f"{one.folder.name} and {other.folder.name} share {shared} tokens, of {len(names[0])} and "
            f"{len(names[1])}, and are compared token by token. Use models of the same family."
        )
    return common


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: those that print are themselves, the others come after U+0100."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printing}
    others = (byte for byte in range(256) if byte not in printing)
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()
