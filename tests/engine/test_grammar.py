"""Texts that follow a grammar, in any batch, with any sampling and with drafts."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.engine.grammar import choice, json_schema, lark, regex
from tinier.errors import InputError
from tinier.tokenizer import load_tokenizer

Tiny = Callable[..., Checkpoint]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip


def follow(
    model: Checkpoint, params: list[SamplingParams], **options: Any
) -> list[tuple[str, Request]]:
    tokenizer = load_tokenizer(model)
    config = {"max_batch_size": 8, "max_seq_len": 400, "block_size": 4, "device": "cpu"} | options
    engine = Engine(model, EngineConfig(**config), tokenizer=tokenizer)
    requests = [
        engine.add(prompt, one) for prompt, one in zip(prompts(len(params)), params, strict=True)
    ]
    while engine.has_work:
        engine.step()
    return [(tokenizer.decode(request.output), request) for request in requests]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("draft", [None, "prompt", "itself"])
def test_texts_are_what_the_grammar_says(tiny: Tiny, draft: str | None, overlap: bool) -> None:
    model = tiny(initializer_range=0.2)
    sampled: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2},
    ]
    params = [
        SamplingParams(max_tokens=220, grammar=grammar, seed=i, **sampling)
        for grammar in (
            regex("[a-c]{3,6}[0-9]"),
            choice(["yes", "no", 'say "maybe"']),
            json_schema(SCHEMA),
        )
        for i, sampling in enumerate(sampled)
    ]
    free = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    options: dict[str, Any] = {
        "draft": str(model.folder) if draft == "itself" else draft,
        "overlap": overlap,
    }
    found = follow(model, [*params, free], **options)
    assert [request.finished for _, request in found] == ["stop"] * 9 + ["length"]
    texts = [text for text, _ in found]
    for text in texts[:3]:
        assert re.fullmatch("[a-c]{3,6}[0-9]", text)
    for text in texts[3:6]:
        assert text in ("yes", "no", 'say "maybe"')
    for text in texts[6:9]:
        made = json.loads(text)
        assert made["name"] in ("Ann", "Bo")
        assert 0 <= made["age"] <= 99
    assert texts[:9] == [text for text, _ in follow(model, [*params, free])][:9]


def test_log_probabilities_are_the_model_s_own(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    params = SamplingParams(max_tokens=8, grammar=regex("[xyz]{8}"), logprobs=3)
    ((text, request),) = follow(model, [params])
    assert re.fullmatch("[xyz]{8}", text)
    assert all(-50 < entry.logprob < 0 for entry in request.logprobs)
    assert any(entry.token not in entry.top for entry in request.logprobs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: regex("a{3"), "regular expression cannot be followed"),
        (lambda: json_schema({"type": "bird"}), "schema cannot be followed"),
        (lambda: json_schema("{"), "no JSON schema"),
        (lambda: choice([]), "at least one"),
        (lambda: lark("start: nothing"), "grammar cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(make: Callable[[], str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_a_grammar_needs_the_tokenizer(tiny: Tiny) -> None:
    engine = Engine(tiny(), EngineConfig(device="cpu", max_seq_len=64))
    with pytest.raises(InputError, match="needs the tokenizer"):
        engine.add([1], SamplingParams(max_tokens=2, grammar=regex("a")))
