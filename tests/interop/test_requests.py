"""Requests as Open WebUI, aider, continue.dev and others send them: fields and shapes, written anew."""

import json
from typing import Any

import httpx
import pytest

from tinier.serving import Service

SYSTEM = {"role": "system", "content": "You are an expert programmer."}
READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file", "description": "Use this tool if you need to view a file.",
        "parameters": {"type": "object", "required": ["filepath"], "properties": {
            "filepath": {"type": "string", "description": "The path of the file."}}},
    },
}  # fmt: skip
CHATS: dict[str, dict[str, Any]] = {
    "open-webui": {
        "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7, "top_p": 0.9,
        "frequency_penalty": 0.0, "seed": 42, "stop": ["###"], "max_tokens": 4,
    },
    "open-webui, a title": {
        "stream": False, "max_completion_tokens": 4,
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title."}],
    },
    "open-webui, a talk with files and times": {
        "stream": True, "max_tokens": 4,
        "messages": [
            {"role": "user", "content": "Hi", "timestamp": 1764000000, "files": []},
            {"role": "assistant", "content": "Hello", "modelName": "one", "done": True},
            {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
        ],
    },
    "aider": {
        "stream": True, "temperature": 0, "max_tokens": 4,
        "messages": [SYSTEM, {"role": "user", "content": "Fix it."},
                     {"role": "assistant", "content": "Ok."}, {"role": "user", "content": "Now do."}],
    },
    "aider, continuing": {
        "stream": True, "temperature": 0, "max_tokens": 4,
        "messages": [SYSTEM, {"role": "user", "content": "Fix it."},
                     {"role": "assistant", "content": "def f(", "prefix": True}],
    },
    "continue.dev": {
        "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4,
        "messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Explain this."}]}],
    },
    "continue.dev, an agent": {
        "stream": True, "max_tokens": 4, "parallel_tool_calls": False, "tools": [READ_FILE],
        "messages": [
            SYSTEM, {"role": "user", "content": "Read a.py"},
            {"role": "assistant", "content": " ", "tool_calls": [{
                "id": "call_1", "type": "function", "index": 0,
                "function": {"name": "read_file", "arguments": '{"filepath": "a.py"}'}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "print(1)"},
        ],
    },
    "codecompanion": {
        "stream": True, "temperature": 0, "top_p": 1, "stop": None, "max_tokens": 4, "presence_penalty": 0,
        "frequency_penalty": 0, "logit_bias": None, "user": None,
        "messages": [{"id": 1947269257, "opts": {"visible": False}, "cycle": 1, **SYSTEM},
                     {"id": 1, "role": "user", "content": "Hi"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("client", CHATS)
def test_a_client_s_chat_is_answered(service: Service, client: str) -> None:
    body = CHATS[client]
    made = httpx.post(
        f"{service.url}/v1/chat/completions", json=body | {"model": "one"}, timeout=60
    )
    assert made.status_code == 200, made.text
    if not body["stream"]:
        assert made.json()["choices"][0]["message"]["role"] == "assistant"
        return
    lines = [line[6:] for line in made.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert all("error" not in chunk for chunk in chunks)
    ends = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert ends[-1] in ("stop", "length", "tool_calls")
    assert bool(chunks[-1].get("usage")) == ("stream_options" in body)


def test_continue_dev_s_autocompletion_is_answered(service: Service) -> None:
    """Many stop strings: of the template, of the language, and paths."""
    stops = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>", "</fim_middle>",
             "</code>", "/src/", "#- coding: utf-8", "```", "\n\n", "\r\n\r\n", "\nfunction", "\nclass",
             "\nmodule", "\nexport", "\nimport", "\ndef", "\n\"\"\"#"]  # fmt: skip
    asked = {
        "model": "one", "prompt": "<fim_prefix>def f(<fim_suffix>\n<fim_middle>", "max_tokens": 8,
        "temperature": 0.01, "stream": True, "stop": stops, "presence_penalty": 0, "frequency_penalty": 0,
    }  # fmt: skip
    made = httpx.post(f"{service.url}/v1/completions", json=asked, timeout=60)
    assert made.status_code == 200, made.text
    assert made.text.rstrip().endswith("[DONE]")


def test_clients_look_for_models_first(service: Service) -> None:
    listed = httpx.get(f"{service.url}/v1/models", headers={"Authorization": "Bearer sk-x"}).json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["one"]
    assert httpx.get(f"{service.url}/v1/models/one").json()["id"] == "one"
