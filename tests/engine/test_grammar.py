"""Texts that follow a grammar, in any batch, with any sampling and with drafts."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.engine.grammar import Grammars, choice, forbidden, json_schema, lark, regex, spread
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


def test_the_next_step_runs_while_a_token_is_checked(tiny: Tiny) -> None:
    """Of overlapping steps: the masks are made while the device computes, and only then sampled by."""
    model = tiny(initializer_range=0.2)
    config = EngineConfig(max_seq_len=400, device="cpu", overlap=True)
    engine = Engine(model, config, tokenizer=load_tokenizer(model))
    params = SamplingParams(max_tokens=20, grammar=regex("[a-c]{12}"))
    request = engine.add([1, 2, 3], params)
    for known in range(10):
        engine.step()
        assert (len(request.output), request.num_pending) == (known, 1)
    while engine.has_work:
        engine.step()
    assert re.fullmatch("[a-c]{12}", load_tokenizer(model).decode(request.output))


def test_bits_are_spread_on_a_device_as_on_the_host(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny())
    grammars = Grammars(tokenizer, 300, torch.device("cpu"))
    made = [regex("[a-f]+x"), regex("\\d+"), choice(["yes", "no"])] * 6
    matchers = [grammars.matcher(grammar, (0,)) for grammar in made]
    allowed = grammars.allowed(matchers)
    assert torch.equal(allowed[:3], grammars.allowed(matchers[:3]))  # one after the other
    on_host = forbidden(allowed, 264)
    assert torch.equal(spread(allowed)[:, :264], on_host)
    assert on_host.any()
    assert not on_host.all(dim=1).any()


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
