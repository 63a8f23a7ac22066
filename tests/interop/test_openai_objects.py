"""The `openai` package's own objects, sent back as clients do."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tinier.serving import Service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1/", api_key="none", max_retries=0) as made:
        yield made


def test_a_conversation_of_five_turns_with_the_answers_as_they_came(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    lengths = []
    for turn in range(5):
        messages.append({"role": "user", "content": f"{turn}?"})
        answer = client.chat.completions.create(
            model="one", messages=messages, max_tokens=4, temperature=0
        )
        assert answer.usage is not None
        lengths.append(answer.usage.prompt_tokens)
        messages.append(answer.choices[0].message)  # the object itself: refusal, annotations, …
    assert len(messages) == 11
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_an_answer_as_a_dictionary_with_all_its_fields(client: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(model="one", messages=asked, max_tokens=3)
    said = answer.choices[0].message.model_dump()  # every field, null where there is nothing
    assert "refusal" in said
    again = client.chat.completions.create(
        model="one", messages=[*asked, said, {"role": "user", "content": "y"}], max_tokens=3
    )
    assert again.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None}, {"tools": []}, {"tool_choice": "none"}, {"parallel_tool_calls": True},
        {"service_tier": "auto"}, {"reasoning_effort": None}, {"reasoning_effort": "none"},
        {"store": False}, {"metadata": {"a": "b"}}, {"user": "me"}, {"safety_identifier": "me"},
        {"modalities": ["text"]}, {"response_format": {"type": "text"}}, {"verbosity": "medium"},
        {"stream_options": None}, {"prompt_cache_key": "k"}, {"logit_bias": {}}, {"functions": []},
    ],
)  # fmt: skip
def test_known_fields_that_ask_for_nothing_are_taken(
    client: openai.OpenAI, neutral: dict[str, Any]
) -> None:
    answer = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "x"}], max_tokens=2, extra_body=neutral
    )
    assert answer.choices[0].finish_reason


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"), ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"store": True}, "store"), ({"modalities": ["text", "audio"]}, "modalities"),
        ({"service_tier": "flex"}, "service_tier"), ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"nothing_known": None}, "nothing_known"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(
    client: openai.OpenAI, asked: dict[str, Any], name: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=name) as caught:
        client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "x"}], max_tokens=2, extra_body=asked
        )
    assert name in str(caught.value.param)


def test_parts_are_joined_with_line_ends_and_may_carry_hints(client: openai.OpenAI) -> None:
    def tokens(content: Any) -> int:
        answer = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": content}], max_tokens=2
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    parts = [
        {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "two"},
    ]
    assert tokens(parts) == tokens("one\ntwo") == tokens("onetwo") + 1


def test_a_refusal_stands_for_what_was_said(client: openai.OpenAI) -> None:
    said: Any = {"role": "assistant", "content": None, "refusal": "I cannot."}
    answer = client.chat.completions.create(
        model="one", messages=[said, {"role": "user", "content": "x"}], max_tokens=2
    )
    assert answer.choices[0].finish_reason


def test_an_image_is_refused_by_name(client: openai.OpenAI) -> None:
    part: Any = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(openai.BadRequestError, match="parts of type 'text', not 'image_url'"):
        client.chat.completions.create(model="one", messages=[{"role": "user", "content": [part]}])
