"""Structured output as clients ask for it: OpenAI's response_format, vLLM's fields."""

import json
import re
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tinier.serving import Service

ASKED: dict[str, Any] = {
    "model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200,
    "temperature": 1, "seed": 2,
}  # fmt: skip
SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"], "additionalProperties": False,
}  # fmt: skip


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    lives: bool


def text(service: Service, **fields: Any) -> str:
    made = httpx.post(f"{service.url}/v1/chat/completions", json=ASKED | fields, timeout=60)
    assert made.status_code == 200, made.text
    choice = made.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    found: str = choice["message"]["content"]
    return found


def test_openai_s_parse(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    made = client.chat.completions.parse(**ASKED, response_format=Pet)
    assert isinstance(made.choices[0].message.parsed, Pet)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}}, {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)  # fmt: skip
def test_schemas_by_every_name(service: Service, fields: dict[str, Any]) -> None:
    made = json.loads(text(service, **fields))
    assert isinstance(made["ok"], bool)
    assert made["kind"] in ("a", "b")


def test_other_forms(service: Service) -> None:
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", text(service, guided_regex="[0-9]{4}-[0-9]{2}"))
    for fields in (
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ):
        assert text(service, **fields) in ("yes", "no")
    assert text(service, guided_grammar='start: "x" "y"+ "z"', temperature=0).startswith("xy")
    # thoughts that a template opens are no part of it
    assert text(service, guided_choice=["yes"], chat_template_kwargs={"thinks": True}) == "yes"
    made = httpx.post(
        f"{service.url}/v1/completions",
        json={"model": "one", "prompt": "x", "max_tokens": 5, "guided_choice": ["ab"]},
    ).json()
    assert made["choices"][0]["text"] == "ab"


def test_streams_and_several_answers(service: Service) -> None:
    body = ASKED | {"guided_regex": "[a-d]{10}", "stream": True, "n": 3}
    texts = {0: "", 1: "", 2: ""}
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
    assert all(re.fullmatch("[a-d]{10}", one) for one in texts.values())
    assert len(set(texts.values())) == 3


def test_any_object(service: Service) -> None:
    """A model of random weights may write names for ever; what it writes is the beginning of an object."""
    made = httpx.post(
        f"{service.url}/v1/chat/completions",
        json=ASKED | {"response_format": {"type": "json_object"}},
        timeout=60,
    ).json()["choices"][0]
    assert made["message"]["content"].startswith("{")
    if made["finish_reason"] == "stop":
        assert isinstance(json.loads(made["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guided_regex": "a{3"}, "cannot be followed"),
        ({"guided_json": {"type": "bird"}}, "cannot be followed"),
        ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "more than one form"),
        ({"response_format": {"type": "json_schema"}}, "has a json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": SCHEMA}}}, "has a json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"yaml": "x"}}, "yaml"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_a_400_with_its_reason(
    service: Service, fields: dict[str, Any], said: str
) -> None:
    made = httpx.post(f"{service.url}/v1/chat/completions", json=ASKED | fields)
    assert made.status_code == 400
    assert said in made.json()["error"]["message"]
