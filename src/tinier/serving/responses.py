"""OpenAI's responses, `POST /v1/responses`: the chat endpoint's work in other words, and nothing is stored.

Start at `ResponsesBody` and `start_response`. Fields and events are OpenAI's
(https://platform.openai.com/docs/api-reference/responses); tools are functions.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from tinier.serving.generation import Chat, start_chat
from tinier.serving.model import Model
from tinier.serving.protocol import ApiError, ChatBody, refusal_as_text, settle
from tinier.serving.tools import Function, NamedFunction

_Text = Annotated[str, Field(max_length=4_000_000)]
_Id = Annotated[str, Field(max_length=256)]
# answers carry them, and they may be sent back
_OF_ITEMS: dict[str, tuple[object, ...]] = {
    "id": (),
    "status": (),
    "annotations": (),
    "logprobs": (),
    "phase": (),
}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "background": (False,), "conversation": (None,), "include": (), "max_tool_calls": (None,),
    "metadata": (), "previous_response_id": (None,), "prompt": (None,), "prompt_cache_key": (),
    "prompt_cache_retention": (), "safety_identifier": (), "service_tier": ("auto", "default"),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "store": (False,), "stream_options": ({}, {"include_obfuscation": False}), "top_logprobs": (0,),
    "truncation": ("disabled",), "user": (),
}  # fmt: skip


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return settle(values, _OF_ITEMS, "input.")


class TextItem(_Item):
    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: _Text

    @model_validator(mode="before")
    @classmethod
    def _declined(cls, values: Any) -> Any:
        return refusal_as_text(values) if isinstance(values, dict) else values


_Content = _Text | Annotated[list[TextItem], Field(max_length=1000)]


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: _Id
    name: _Id
    arguments: _Text


class FunctionOutput(_Item):
    type: Literal["function_call_output"]
    call_id: _Id
    output: _Content


class Reasoning(_Item):
    """What an earlier answer thought."""

    type: Literal["reasoning"]
    summary: list[TextItem] | None = None
    content: list[TextItem] | None = None
    encrypted_content: str | None = None


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else "message"
    if kind not in ("message", "function_call", "function_call_output", "reasoning"):
        raise ApiError(
            400,
            f"This server takes messages, function calls and their outputs, not {kind!r}.",
            param="input",
        )
    return str(kind)


_AnyItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Function):
    type: Literal["function"]


class ChosenTool(NamedFunction):
    type: Literal["function"]


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=300)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        """As a response_format."""
        if self.type != "json_schema":
            return {"type": self.type}
        if self.schema_ is None:
            raise ApiError(400, "text.format 'json_schema' needs a schema.", param="text")
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=300)]
    input: _Text | Annotated[list[_AnyItem], Field(min_length=1, max_length=10_000)]
    instructions: _Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return settle(values, _NEUTRAL)

    def as_chat(self) -> ChatBody:
        """The same, asked of the chat endpoint. Raises ApiError."""
        chosen: Any = self.tool_choice
        if isinstance(chosen, ChosenTool):
            chosen = {"type": "function", "function": {"name": chosen.name}}
        asked = {
            "model": self.model, "messages": list(self._messages()), "temperature": self.temperature,
            "top_p": self.top_p, "max_completion_tokens": self.max_output_tokens, "tool_choice": chosen,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools or ()
            ],
        }  # fmt: skip
        if self.text and self.text.format:
            asked["response_format"] = self.text.format.as_chat()
        try:
            return ChatBody.model_validate(asked)
        except ValidationError as error:
            first = error.errors()[0]
            raise ApiError(400, f"input: {first['msg']}.", param="input") from None

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Of a chat: calls that follow each other, and what was thought before, are one message's."""
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        items = (
            [InputMessage(role="user", content=self.input)]
            if isinstance(self.input, str)
            else self.input
        )
        said: dict[str, Any] | None = None  # the assistant's, which may go on
        for item in items:
            if isinstance(item, FunctionCall):
                said = said or {"role": "assistant", "content": ""}
                function = {"name": item.name, "arguments": item.arguments}
                said.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
                continue
            if said is not None and not _goes_on(said, item):
                yield said
                said = None
            if isinstance(item, Reasoning):
                thought = _plain(item.content or item.summary or [])
                said = {"role": "assistant", "content": "", "reasoning_content": thought or None}
            elif isinstance(item, FunctionOutput):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _plain(item.output)}
            elif item.role == "assistant":
                said = (said or {"role": "assistant"}) | {"content": _plain(item.content)}
            else:
                yield {"role": item.role, "content": _plain(item.content)}
        if said is not None:
            yield said


def _goes_on(said: dict[str, Any], item: Any) -> bool:
    """Whether an item belongs to the assistant's message before it: an answer behind its thoughts."""
    is_answer = isinstance(item, InputMessage) and item.role == "assistant"
    return is_answer and not said["content"] and "tool_calls" not in said


def _plain(content: str | list[TextItem]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Responses:
    """One response. `close` must be called: it ends what is still computed."""

    def __init__(self, chat: Chat, body: ResponsesBody) -> None:
        self._chat = chat
        tools = [tool.model_dump() for tool in body.tools or ()]
        form = body.text.format if body.text else None
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "model": body.model, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "tools": tools, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice.model_dump()
            if isinstance(body.tool_choice, ChosenTool) else body.tool_choice or "auto",
            "text": {"format": TextFormat.model_dump(
                form or TextFormat(type="text"), by_alias=True, exclude_none=True)},
            "store": False, "background": False, "previous_response_id": None, "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None}, "metadata": {}, "error": None,
        }  # fmt: skip
        self._number = 0
        """Of the next event"""
        self._items: list[dict[str, Any]] = []
        """Of a stream, those that are whole"""
        self._opened: dict[str, Any] | None = None
        """The one that pieces are added to"""

    async def whole(self) -> dict[str, Any]:
        """The response as one object."""
        made = await self._chat.whole()
        (choice,) = made["choices"]
        message = choice["message"]
        items = []
        if message.get("reasoning_content"):
            items.append(_thoughts(message["reasoning_content"]))
        if message["content"] or not message.get("tool_calls"):
            items.append(_message(message["content"]))
        items += [_call(call) for call in message.get("tool_calls", ())]
        return self._object(items, choice["finish_reason"])

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events."""
        yield self._event("created", response=self._object([], None))
        yield self._event("in_progress", response=self._object([], None))
        (choice,) = self._chat.choices
        reason = None
        async with aclosing(choice.deltas()) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                reason = delta.finished
                news = self._chat.news(choice, delta)
                for event in self._said("reasoning", news.get("reasoning_content", "")):
                    yield event
                for event in self._said("message", news["content"]):
                    yield event
                for call in news.get("tool_calls", ()):
                    for event in self._called(_call(call)):
                        yield event
        if not self._items and self._opened is None:
            for event in self._open(_message("")):
                yield event
        if self._opened is not None and reason == "length":
            self._opened["status"] = "incomplete"
        for event in self._close():
            yield event
        ends = self._object(self._items, reason)
        yield self._event(ends["status"], response=ends)

    def close(self) -> None:
        self._chat.close()

    def _object(self, items: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        """reason: why the text ended; None: it has not."""
        cut = reason == "length"
        if cut and items:
            items[-1]["status"] = "incomplete"
        status = "in_progress" if reason is None else "incomplete" if cut else "completed"
        return {
            **self._head, "status": status, "output": items,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": None if reason is None else _usage(self._chat.usage()),
        }  # fmt: skip

    def _event(self, name: str, **fields: Any) -> bytes:
        kind = f"response.{name}"
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

    def _text_event(self, name: str, **fields: Any) -> bytes:
        """Of the item that pieces are added to."""
        assert self._opened is not None
        place = {
            "item_id": self._opened["id"],
            "output_index": len(self._items),
            "content_index": 0,
        }
        if self._opened["type"] == "reasoning":
            return self._event(f"reasoning_text.{name}", **place, **fields)
        return self._event(f"output_text.{name}", **place, **fields, logprobs=[])

    def _said(self, kind: str, text: str) -> Iterator[bytes]:
        """A piece of the thoughts or of the message."""
        if not text:
            return
        if self._opened is not None and self._opened["type"] != kind:
            yield from self._close()
        if self._opened is None:
            yield from self._open(_thoughts("") if kind == "reasoning" else _message(""))
        assert self._opened is not None
        self._opened["content"][0]["text"] += text
        yield self._text_event("delta", delta=text)

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        self._opened, index = item, len(self._items)
        bare = item | {"status": "in_progress", "content": []}
        yield self._event("output_item.added", output_index=index, item=bare)
        yield self._event(
            "content_part.added", item_id=item["id"], output_index=index, content_index=0,
            part=dict(item["content"][0]),
        )  # fmt: skip

    def _close(self) -> Iterator[bytes]:
        """End the item that pieces are added to, if there is one."""
        item, index = self._opened, len(self._items)
        if item is None:
            return
        (part,) = item["content"]
        yield self._text_event("done", text=part["text"])
        yield self._event(
            "content_part.done", item_id=item["id"], output_index=index, content_index=0, part=part
        )
        yield self._event("output_item.done", output_index=index, item=item)
        self._items.append(item)
        self._opened = None

    def _called(self, item: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        index = len(self._items)
        place = {"item_id": item["id"], "output_index": index}
        bare = item | {"status": "in_progress", "arguments": ""}
        yield self._event("output_item.added", output_index=index, item=bare)
        yield self._event("function_call_arguments.delta", **place, delta=item["arguments"])
        yield self._event("function_call_arguments.done", **place, arguments=item["arguments"])
        yield self._event("output_item.done", output_index=index, item=item)
        self._items.append(item)


def _message(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "completed",
            "content": [part]}  # fmt: skip


def _thoughts(text: str) -> dict[str, Any]:
    return {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": [], "status": "completed",
            "content": [{"type": "reasoning_text", "text": text}]}  # fmt: skip


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """From a chat's."""
    return {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"],
            "status": "completed", **call["function"]}  # fmt: skip


def _usage(counts: dict[str, Any]) -> dict[str, Any]:
    details = counts.get("completion_tokens_details", {})
    return {
        "input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"],
        "total_tokens": counts["total_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
    }  # fmt: skip


async def start_response(model: Model, body: ResponsesBody) -> Responses:
    """Raises InputError, ApiError, Overloaded or Unavailable."""
    return Responses(await start_chat(model, body.as_chat()), body)
