"""Streams of tokens as text: the pieces are the whole text, and stop strings end it."""

import itertools
import random
from typing import Any

import pytest
from tests.conftest import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tinier.checkpoint import Checkpoint
from tinier.engine.text import TextStream
from tinier.tokenizer import load_tokenizer

TEXT = "Zürich, 東京 & नमस्ते: 🙂👩‍👩‍👧 cost 5 €…\n\tend  . done �!"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: ▁ for spaces, the first one dropped, and bytes for what has no token."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁the",
        "e",
        "s",
        "▁a",
        ".",
    ]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>",
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def streamed(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> TextStream:
    """The stream after all ids; its pieces are its text, and only ever grow."""
    stream = TextStream(tokenizer, stop)
    text = ""
    for token in ids:
        text += stream.push(token)
        assert stream.text == text
    text += stream.close()
    assert stream.text == text
    return stream


def whole(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def test_pieces_join_to_the_text_and_characters_are_whole() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT * 3)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.close() == TEXT * 3
    assert stream.num_tokens == len(ids)
    # TEXT has a replacement character of its own, which comes with the next character
    assert all("�" not in piece or piece == "�!" for piece in pieces)


@pytest.mark.parametrize("seed", range(40))
def test_random_ids_give_the_text_of_all_ids(seed: int) -> None:
    tokenizer = byte_tokenizer()
    draw = random.Random(seed)
    lead_bytes = tokenizer("é東🙂")["input_ids"]
    pools = [range(264), lead_bytes, [256, 257, 263, *lead_bytes], tokenizer("aé🙂 ")["input_ids"]]
    ids = [draw.choice(draw.choice(pools)) for _ in range(200)]
    assert streamed(tokenizer, ids).text == whole(tokenizer, ids)


@pytest.mark.parametrize("seed", range(10))
def test_broken_bytes_without_end_give_the_text_of_all_ids(seed: int) -> None:
    tokenizer = byte_tokenizer()
    draw = random.Random(seed)
    ids = tokenizer("🙂")["input_ids"]
    broken = [draw.choice(ids) for _ in range(300)]
    assert streamed(tokenizer, broken).text == whole(tokenizer, broken)
    half = ids[:2] * 100
    assert streamed(tokenizer, half).text == whole(tokenizer, half)


@pytest.mark.parametrize("seed", range(20))
def test_a_tokenizer_that_drops_the_first_space_keeps_the_others(seed: int) -> None:
    tokenizer = byte_fallback_tokenizer()
    draw = random.Random(seed)
    characters = [[2 + byte for byte in text.encode()] for text in ("é", "東", "🙂")]
    units = [[258], [259], [260], [261], [262], [263], [1], *characters]
    ids = list(itertools.chain.from_iterable(draw.choices(units, k=120)))
    assert streamed(tokenizer, ids).text == whole(tokenizer, ids)


@pytest.mark.network
def test_the_real_tokenizer_streams_its_text(smollm2: Checkpoint) -> None:
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode(TEXT * 5)
    assert streamed(tokenizer, ids).text == TEXT * 5
    draw = random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(49_152) for _ in range(300)]
        assert streamed(tokenizer, ids).text == whole(tokenizer, ids)


class Counting:
    """A tokenizer that notes how many ids it decodes at once."""

    def __init__(self) -> None:
        self._tokenizer = byte_tokenizer()
        self.added_tokens_decoder = self._tokenizer.added_tokens_decoder
        self.calls: list[int] = []

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.calls.append(len(ids))
        return whole(self._tokenizer, ids)


@pytest.mark.parametrize("text", ["some long text. ", "🙂", "\N{CYRILLIC SMALL LETTER ZHE}"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(text: str) -> None:
    tokenizer = Counting()
    ids = byte_tokenizer()(text * 100)["input_ids"]
    assert streamed(tokenizer, ids).text == text * 100
    assert max(tokenizer.calls) < 24
    assert len(tokenizer.calls) < 1.3 * len(ids)


@pytest.mark.parametrize("unit", ["é", "🙂"])
def test_nor_does_it_for_tokens_that_make_no_characters(unit: str) -> None:
    tokenizer = Counting()
    last = byte_tokenizer()(unit)["input_ids"][-1]
    assert streamed(tokenizer, [last] * 500).text == "�" * 500
    assert max(tokenizer.calls) < 40
    ended = Counting()
    assert streamed(ended, [last, *[257] * 500, 263]).text == "�"
    assert max(ended.calls) == 1


@pytest.mark.parametrize(
    ("text", "stop", "kept", "stopped"),
    [
        ("one STOP two", ("STOP",), "one ", "STOP"),
        ("one STO two", ("STOP",), "one STO two", None),
        ("ends with STO", ("STOP",), "ends with STO", None),
        ("aababaabac", ("abac",), "aababa", "abac"),
        ("STOP", ("STOP",), "", "STOP"),
        ("a\n\nb###c", ("###", "\n\n"), "a", "\n\n"),
        ("xabcdx", ("abcd", "bc"), "xa", "bc"),  # complete first
        ("xabcdx", ("cd", "abcd", "bcd"), "x", "abcd"),  # complete at once: the longest
        ("5 € each", ("€",), "5 ", "€"),
        ("naïve", ("ïv", "e"), "na", "ïv"),
        ("nothing", ("STOP", "x", "gn"), "nothing", None),
    ],
)
def test_the_stop_string_that_is_complete_first_ends_the_text(
    text: str, stop: tuple[str, ...], kept: str, stopped: str | None
) -> None:
    tokenizer = byte_tokenizer()
    stream = streamed(tokenizer, tokenizer(text)["input_ids"], stop)
    assert (stream.text, stream.stopped) == (kept, stopped)


def test_text_after_the_stop_string_is_not_given() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ("#",))
    assert [stream.push(token) for token in tokenizer("a#b")["input_ids"]] == ["a", "", ""]
    assert stream.close() == ""
    assert stream.num_tokens == 3


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ("<end>",))
    ids = tokenizer("a<enx<e")["input_ids"]
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "<enx", "", ""]
    assert stream.close() == "<e"


def test_a_stop_string_may_be_completed_by_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a�")["input_ids"]  # held back: it might be part of a character
    stream = TextStream(tokenizer, ("�",))
    assert [stream.push(token) for token in ids] == ["a", "", "", ""]
    assert (stream.close(), stream.stopped) == ("", "�")


class Pieces:
    """A tokenizer whose tokens are given strings."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(self._pieces[i] for i in ids)


@pytest.mark.parametrize("seed", range(60))
def test_how_tokens_cut_the_text_does_not_matter(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("abc", k=60))
    stop = tuple("".join(draw.choices("abc", k=draw.randint(2, 6))) for _ in range(3))
    ends = [
        (i, s)
        for i in range(61)
        for s in sorted(stop, key=len, reverse=True)
        if text[:i].endswith(s)
    ]
    expected = (text[: ends[0][0] - len(ends[0][1])], ends[0][1]) if ends else (text, None)
    for longest in (1, 3, 20):
        pieces, rest = [], text
        while rest:
            size = draw.randint(1, longest)
            pieces.append(rest[:size])
            rest = rest[size:]
        stream = streamed(Pieces(pieces), list(range(len(pieces))), stop)
        assert (stream.text, stream.stopped) == expected
