"""What a model thinks before it answers: text between <think> and </think> (Qwen3, SmolLM3, DeepSeek-R1).

Start at `Thoughts`. A chat template may open the thinking itself, so that the model's text begins inside.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

from tinier.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
_BEGINNING = 64  # tokens among which an opening tag stands


class Thoughts:
    """Parts the text of one answer, piece by piece, into thoughts and the answer itself.

    White space around the thoughts and before the answer behind them is left out.
    """

    def __init__(self, *, opened: bool) -> None:
        """opened: the prompt ended within the thinking."""
        self.opened = opened
        self._part: Literal["start", "thoughts", "answer"] = "thoughts" if opened else "start"
        self._held = ""
        """Text that was not given yet"""
        self._begun = False
        """Whether some of this part was given"""

    def push(self, text: str) -> tuple[str, str]:
        """The thoughts and the answer that this piece makes certain."""
        self._held += text
        if self._part == "start":
            start = self._held.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                return "", ""
            if start.startswith(OPEN):
                self._part, self._held = "thoughts", start.removeprefix(OPEN)
            else:
                self._part, self._begun = "answer", True
        thoughts = ""
        if self._part == "thoughts":
            inside, tag, after = self._held.partition(CLOSE)
            if not tag:
                return self._take(len(inside) - _overlap(inside)), ""
            thoughts = self._take(len(inside))
            self._part, self._held, self._begun = "answer", after, False
        return thoughts, self._take(len(self._held))

    def close(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        if self._part == "start":
            return "", self._held
        return self._take(len(self._held)), ""

    def _take(self, count: int) -> str:
        """Give text of this part from the start of what is held. White space that may end it stays."""
        text = self._held[:count]
        if self._part == "thoughts":
            text = text.rstrip()
        self._held = self._held[len(text) :]
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text


def _overlap(text: str) -> int:
    """Characters at the end of a text that may begin the closing tag."""
    return next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)


def num_thought_tokens(tokenizer: Tokenizer, output: Sequence[int], *, opened: bool) -> int:
    """How many tokens of an answer are thoughts, the tags counted. opened: the prompt ended within them."""

    def text(count: int) -> str:
        return tokenizer.decode(list(output[:count]), skip_special_tokens=False)

    if not opened and not text(_BEGINNING).lstrip().startswith(OPEN):
        return 0
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    if added.get(CLOSE) in output:
        end = output.index(added[CLOSE])
        if CLOSE not in text(end):
            return end + 1
    # the fewest tokens whose text has the closing tag; all where there is none
    return bisect_left(range(len(output)), True, key=lambda count: CLOSE in text(count))


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether a model may think so: its template or its tokens have the tag."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return OPEN in added or OPEN in str(tokenizer.inner.chat_template)
