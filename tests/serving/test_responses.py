"""`/v1/responses` as OpenAI's own client reads it: the chat endpoint's answers in other words."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from tests.serving.conftest import ENGINE, TEMPLATE, write_model

from tinier.serving import ServeConfig, Service
from tinier.serving.responses import ResponsesBody

WEATHER: dict[str, Any] = {
    "type": "function", "name": "weather", "strict": True,
    "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


class Pet(pydantic.BaseModel):
    lives: bool


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("responses")
    # tools need no words
    plain = write_model(root / "one", template=TEMPLATE + "{% if tools %}<tools>{% endif %}")
    thinks = TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}"
    thinking = write_model(root / "two", template=thinks)
    with Service([f"one={plain}", f"two={thinking}"], ENGINE, ServeConfig(port=0)) as running:
        yield running


@pytest.fixture
def client(served: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def chat(served: Service, **fields: Any) -> dict[str, Any]:
    asked = {"model": "one", "messages": TALK, "temperature": 0} | fields
    made = httpx.post(f"{served.url}/v1/chat/completions", json=asked, timeout=60).json()
    return dict(made)


def test_the_text_is_the_chat_s(served: Service, client: openai.OpenAI) -> None:
    made = client.responses.create(
        model="one", instructions="Be brief.", input="Hi", max_output_tokens=12, temperature=0
    )
    same = chat(served, max_tokens=12)
    assert made.output_text == same["choices"][0]["message"]["content"]
    assert made.usage
    assert made.usage.input_tokens == same["usage"]["prompt_tokens"]
    assert made.usage.output_tokens == same["usage"]["completion_tokens"]
    length = same["choices"][0]["finish_reason"] == "length"
    assert made.status == ("incomplete" if length else "completed")
    assert (made.incomplete_details is not None) == length
    assert made.output[-1].status == made.status  # type: ignore[union-attr]
    again = client.responses.create(
        model="one", input=[*TALK, *made.output, {"role": "user", "content": "Bye"}],  # type: ignore[list-item]
        max_output_tokens=3,
    )  # fmt: skip
    assert again.output_text


def test_events_make_up_the_response(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "one",
        "input": TALK,
        "max_output_tokens": 12,
        "temperature": 0,
    }
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events: list[Any] = list(stream)
    made = events[-1].response
    (done,) = [event for event in events if event.type == "response.output_item.done"]
    assert done.item.status == made.output[-1].status == made.status
    assert made.output[0].content[0].text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done",
                            "response.output_item.done"]  # fmt: skip
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert made.usage == whole.usage


def test_thoughts_are_an_item_before_the_message(served: Service, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "two",
        "input": "Hi",
        "max_output_tokens": 10,
        "temperature": 0,
    }
    made = client.responses.create(**asked)
    (thoughts, message) = made.output
    said = chat(served, model="two", messages=TALK[1:], max_tokens=10)["choices"][0]["message"]
    assert thoughts.type == "reasoning"
    assert thoughts.content
    assert thoughts.content[0].text == said["reasoning_content"]
    assert message.type == "message"
    with client.responses.stream(**asked) as stream:
        pieces = [e.delta for e in stream if e.type == "response.reasoning_text.delta"]
    assert "".join(pieces) == said["reasoning_content"]
    assert made.usage
    assert made.usage.output_tokens_details.reasoning_tokens == 10  # it thinks to the end


@pytest.mark.parametrize("streams", [False, True])
def test_functions_are_called_and_answered(client: openai.OpenAI, streams: bool) -> None:
    asked: dict[str, Any] = {
        "model": "one", "input": TALK, "tools": [WEATHER], "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 150,
    }  # fmt: skip
    if streams:
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            made: Any = stream.get_final_response()
        assert "response.function_call_arguments.done" in kinds
    else:
        made = client.responses.create(**asked)
    (call,) = made.output
    assert (call.type, call.name, made.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sun"}
    after = client.responses.create(
        model="one", input=[*TALK, call, output], tools=[WEATHER],  # type: ignore[list-item]
        tool_choice="none", max_output_tokens=4,
    )  # fmt: skip
    assert after.output_text


def test_a_form_is_followed(client: openai.OpenAI) -> None:
    made = client.responses.parse(model="one", input="Hi", text_format=Pet, max_output_tokens=60)
    assert isinstance(made.output_parsed, Pet)


def test_what_was_declined_may_be_sent_back() -> None:
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    body = ResponsesBody.model_validate({"model": "x", "input": [said]}).as_chat()
    assert body.messages[0].content == "No."


def test_items_make_one_message_where_they_belong_together() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "So"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
        call, call | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "Sun"},
        {"role": "assistant", "content": "Done"}, {"role": "assistant", "content": "Indeed"},
    ]  # fmt: skip
    body = ResponsesBody.model_validate({"model": "x", "input": items}).as_chat()
    told = [
        (m.role, m.content, m.reasoning_content, len(m.tool_calls or ())) for m in body.messages
    ]
    assert told == [
        ("user", "Hi", None, 0), ("assistant", "I look", "So", 2), ("tool", "Sun", None, 0),
        ("assistant", "Done", None, 0), ("assistant", "Indeed", None, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"store": True}, "'store' asks for something"),
        ({"previous_response_id": "resp_1"}, "'previous_response_id' asks for something"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"type": "computer_call"}]}, "not 'computer_call'"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
         "no JSON object"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs a schema"),
        ({"tool_choice": "required"}, "'required' needs tools"),
        ({"nothing_known": 1}, "nothing_known"), ({"input": []}, "input"), ({"model": "three"}, "three"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(served: Service, fields: dict[str, Any], said: str) -> None:
    asked = {"model": "one", "input": "Hi"} | fields
    made = httpx.post(f"{served.url}/v1/responses", json=asked, timeout=60)
    assert made.status_code in (400, 404)
    assert said in made.json()["error"]["message"]
