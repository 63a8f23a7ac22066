"""LangChain and LiteLLM with their defaults, in an environment of their own."""

import json
import subprocess
import sys

import pytest
from tests.conftest import environment

from tinier.serving import Service

pytestmark = [pytest.mark.network, pytest.mark.slow]
PACKAGES = ["langchain-openai==1.7.4", "litellm==1.110.2"]

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
url = sys.argv[1]
chat = ChatOpenAI(model="one", base_url=url + "/v1", api_key="none", max_tokens=4, max_retries=0)
talk = [("system", "Be brief."), ("user", "x")]
first = chat.invoke(talk)
second = chat.invoke([*talk, first, ("user", "y")])  # LangChain's own object, sent back
pieces = [chunk.content for chunk in chat.stream(talk)]
whole = OpenAI(model="one", base_url=url + "/v1", api_key="none", max_tokens=4, max_retries=0).invoke("x")
print(json.dumps([isinstance(second.content, str), len(pieces) > 0, isinstance(whole, str)]))
"""
LANGCHAIN_TOOLS = """
import json, sys
from typing import Literal
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

@tool
def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2]) -> str:
    "The weather of a city."
    return f"{city}: sunny for {days}"

class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    lives: bool

chat = ChatOpenAI(model="one", base_url=sys.argv[1] + "/v1", api_key="none", max_tokens=200, max_retries=0)
pets = [chat.with_structured_output(Pet, method=m).invoke("x") for m in ("json_schema", "function_calling")]
bound = chat.bind_tools([weather], tool_choice="weather")
asked = [HumanMessage("x")]
called = bound.invoke(asked)
(call,) = called.tool_calls
told = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
after = chat.bind_tools([weather]).invoke([*asked, called, told])
whole = None
for piece in bound.stream(asked):
    whole = piece if whole is None else whole + piece
print(json.dumps([all(isinstance(pet, Pet) for pet in pets), isinstance(after.content, str),
                  [call["name"] for call in whole.tool_calls] == ["weather"]]))
"""
LITELLM = """
import json, sys
import litellm
url = sys.argv[1]
asked = dict(model="openai/one", api_base=url + "/v1", api_key="none", max_tokens=4, num_retries=0)
talk = [{"role": "user", "content": "x"}]
first = litellm.completion(messages=talk, **asked)
second = litellm.completion(
    messages=[*talk, first.choices[0].message, {"role": "user", "content": "y"}], **asked
)
pieces = list(litellm.completion(messages=talk, stream=True, **asked))
whole = litellm.text_completion(prompt="x", **asked | {"model": "text-completion-openai/one"})
print(json.dumps([second.usage.total_tokens > first.usage.total_tokens, len(pieces) > 0,
                  isinstance(whole.choices[0].text, str)]))
"""


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has both (430 MB)."""
    return str(environment("interop", PACKAGES) / "python")


@pytest.mark.parametrize(
    "script", [LANGCHAIN, LANGCHAIN_TOOLS, LITELLM], ids=["langchain", "tools", "litellm"]
)
def test_a_client_s_defaults_are_answered(service: Service, python: str, script: str) -> None:
    done = subprocess.run(
        [python, "-c", script, service.url],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, True, True]
    assert sys.executable != python
