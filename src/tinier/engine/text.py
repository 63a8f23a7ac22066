"""Between text and token ids: prompts in, streamed text out."""

from collections.abc import Iterable

from tinier.checkpoint import Checkpoint, read_json
from tinier.errors import CheckpointError, InputError
from tinier.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt. chat: as one user message of the model's chat template.

    Raises InputError for an empty prompt, TextError for one that is no text, or a model without a chat
    template.
    """
    if not prompt:
        raise InputError("the prompt is empty. Give some text: --prompt 'Once upon a time'")
    if not chat:
        return tokenizer.encode(prompt)
    if not tokenizer.has_template:
        raise InputError("the model has no chat template. Leave --chat out.")
    # the template writes the BOS token itself: encoding its text with another would double it
    text = tokenizer.chat([{"role": "user", "content": prompt}], opens_reply=True)
    return tokenizer.encode(text, special=False)


def stop_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text: the generation defaults', the configuration's and the tokenizer's.

    Raises CheckpointError for defaults that are none.
    """
    stops: set[int] = set()
    sources = {"config.json": checkpoint.config}
    path = checkpoint.folder / "generation_config.json"
    if path.exists():
        sources[path.name] = read_json(path)
    for name, source in sources.items():
        ids = source.get("eos_token_id")
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        for token in listed:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise CheckpointError(
                    f"{checkpoint.folder / name} has eos_token_id={ids!r}. It is a token's number, or a "
                    "list of them."
                )
        stops.update(listed)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return tuple(sorted(stops))


class TextStream:
    """Turns a stream of token ids into text pieces, up to a stop string if there is one.

    The pieces together are what the tokenizer makes of all ids, special tokens skipped unless
    `skip_special_tokens` is False. A piece holds no
    incomplete character and no text that may be the beginning of a stop string. The stop string that is
    complete first ends the text, however the tokens cut it; of several that end there, the longest. One
    that is complete within the first `min_tokens` does not count. The text ends before the stop string,
    or, with `include_stop`, behind it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Iterable[str] = (), min_tokens: int = 0, *,
        skip_special_tokens: bool = True, include_stop: bool = False,
    ) -> None:  # fmt: skip
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""
        self._early = 0
        """Characters of what is held that were there when stop strings did not count yet."""
        self._pieces: list[str] = []
        self.num_tokens = 0
        self.stopped: str | None = None
        """The stop string that ended the text."""

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def push(self, *tokens: int) -> str:
        """The text that these tokens complete; may be empty."""
        if self._stop and self.num_tokens < self._min_tokens and len(tokens) > 1:
            return "".join(self.push(token) for token in tokens)
        self.num_tokens += len(tokens)
        return self._take(self._detokenizer.push(*tokens)) if self.stopped is None else ""

    def close(self) -> str:
        """What is left when the stream ends."""
        if self.stopped is not None:
            return ""
        piece = self._take(self._detokenizer.close())
        tail, self._held = self._held, ""
        self._pieces.append(tail)
        return piece + tail

    def _take(self, new: str) -> str:
        if not (new and self._stop):
            piece = new
        else:
            text = self._held + new
            if self.num_tokens <= self._min_tokens:
                self._early = len(text)
            piece = self._before_stop(text)
            self._held = "" if self.stopped else text[len(piece) :]
            self._early = max(0, self._early - len(piece))
        self._pieces.append(piece)
        return piece

    def _before_stop(self, text: str) -> str:
        """The part of `text` that certainly belongs to the output."""
        found = [
            (at + len(s), at, s)
            for s in self._stop
            # one that ends among the early characters does not count
            if (at := text.find(s, max(0, self._early - len(s) + 1))) >= 0
        ]
        if found:
            end, at, self.stopped = min(found)
            return text[: end if self._include_stop else at]
        longest = max(len(s) for s in self._stop) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            if any(s.startswith(text[at:]) for s in self._stop):
                return text[:at]
        return text


# ids that are decoded again with each new one, at most, unless they make no complete character
_WINDOW = 16
# replacement characters at the end of a text that may still become others: where a tokenizer replaces
# all bytes of a run or none, those of the window and up to 3 of the next character
_INCOMPLETE = _WINDOW + 3


class Detokenizer:
    """Token ids one by one to text, at a cost that does not grow with the text.

    Only a window of the last ids is decoded. It begins where a piece of text began, and not where the
    last one did, so that what a tokenizer does at the beginning of a text (such as to drop a space)
    does not touch the new text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        added = tokenizer.added_tokens_decoder
        special = {token for token, content in added.items() if content.special}
        self._special = special if skip_special_tokens else set()
        self._size = max(len(tokenizer), *(token + 1 for token in added), 0)
        self._ids: list[int] = []
        self._sent = 0
        """Characters of the window's text that were handed out."""
        self._cut = 0
        """Where the ids of the latest piece end, if it ended with a complete character."""

    def push(self, *tokens: int) -> str:
        """The text that is certain now."""
        made = [token for token in tokens if token not in self._special and token < self._size]
        if not made:
            return ""
        self._ids += made
        text = self._decode(self._ids)
        missing = len(text) - len(text.rstrip("\ufffd"))
        # all but the last of a long run are bytes that are no characters
        end = len(text) - (missing if missing <= _INCOMPLETE else 1)
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        if piece and not missing:
            self._advance()
        elif len(self._ids) > 2 * _WINDOW:
            self._cut_broken(text)
        return piece

    def close(self) -> str:
        """What is left when the ids end."""
        return self._decode(self._ids)[self._sent :]

    def _advance(self) -> None:
        if len(self._ids) > _WINDOW and self._cut:
            self._ids = self._ids[self._cut :]
            self._sent = len(self._decode(self._ids))
        self._cut = len(self._ids)

    def _cut_broken(self, text: str) -> None:
        """Shorten a window of bytes that make no characters, between two of those."""
        for at in range(len(self._ids) - _WINDOW, len(self._ids) - _WINDOW // 2):
            gone = self._decode(self._ids[:at])
            if len(gone) <= self._sent and gone + self._decode(self._ids[at:]) == text:
                self._ids = self._ids[at:]
                self._sent -= len(gone)
                self._cut = 0
                return

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips)
