"""Between text and token ids: prompts in, streamed text out."""

import json
from typing import Any

from tinier.checkpoint import Checkpoint
from tinier.errors import InputError


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt. chat: as one user message of the model's chat template.

    Raises InputError for an empty prompt, or a model without a chat template.
    """
    if not prompt:
        raise InputError("the prompt is empty. Give some text: --prompt 'Once upon a time'")
    if not chat:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if tokenizer.chat_template is None:
        raise InputError("the model has no chat template. Leave --chat out.")
    # the template writes the BOS token itself: encoding its text with another would double it
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: the generation defaults', the configuration's and the tokenizer's."""
    stops: set[int] = set()
    path = checkpoint.folder / "generation_config.json"
    sources = [checkpoint.config]
    if path.exists():
        sources.append(json.loads(path.read_text(encoding="utf-8")))
    for source in sources:
        ids = source.get("eos_token_id")
        stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return tuple(sorted(stops))


class TextStream:
    """Turns a stream of token ids into text pieces, holding back incomplete characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        return self._take(hold_back=True)

    def close(self) -> str:
        """What is left when the stream ends."""
        return self._take(hold_back=False)

    def _take(self, *, hold_back: bool) -> str:
        # a byte-level token may end inside a character, which decodes to the replacement character
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if hold_back and text.endswith("�"):
            return ""
        piece: str = text[self._sent :]
        self._sent = len(text)
        return piece
