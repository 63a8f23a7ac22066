"""Tools: functions that a model may ask its client to call, in the form that each family writes.

Start at `style_of`, `ToolCalls` and `grammar`. Families: Hermes (Qwen, SmolLM and most others) writes each
call as JSON between <tool_call> and </tool_call>; Llama 3 answers with nothing but the JSON; Mistral writes
a list behind [TOOL_CALLS], Granite behind <|tool_call|>. A model whose chat template knows no tools is told
of them in Hermes' form, by `in_words`.
"""

import json
import re
import secrets
import string
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tinier.engine.grammar import JSON_SPACING, lark
from tinier.errors import InputError, TextError
from tinier.tokenizer import Tokenizer

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LISTS, _ARGUMENTS, _NUMBER = ("[TOOL_CALLS]", "<|tool_call|>"), "[ARGS]", "[CALL_ID]"
_PYTHON = "<|python_tag|>"
# a small model might go on calling for ever
_MOST_CALLS = 16
# with one of these beside it, a list of properties is not all there is
_OPENING = {
    "additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref",
    "if", "dependentSchemas",
}  # fmt: skip
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


class Function(BaseModel):
    """Of a tool."""

    model_config = ConfigDict(extra="forbid")

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; None: there are none"""
    strict: bool | None = None
    """Whether arguments must follow the schema, also where the model chooses by itself"""


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function

    def as_template_wants(self) -> dict[str, Any]:
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name, "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }  # fmt: skip


class NamedFunction(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: _Name


class NamedTool(BaseModel):
    """The one that must be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(max_length=256)]
    arguments: Annotated[str, Field(max_length=4_000_000)]
    """JSON text"""


class CalledTool(BaseModel):
    """A call in an earlier answer."""

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_template_wants(self) -> dict[str, Any]:
        """With arguments as an object. Raises InputError where they are none."""
        arguments = _json_object(self.function.arguments or "{}")
        if arguments is None:
            raise InputError(
                f"the arguments of the call {self.id} are no JSON object: {self.function.arguments:.80}. "
                "Send them as they came."
            )
        called = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": called}


class Style(NamedTuple):
    """How a model writes its calls."""

    name: Literal["hermes", "llama", "mistral", "unread"]
    """mistral: lists behind a mark, Granite's too; unread: in a way that is not read here"""
    known: bool
    """Whether the chat template writes the tools itself"""
    special: dict[str, int]
    """Marks that are special tokens, which texts leave out unless they are asked for"""
    mark: str = _OPEN
    """What calls begin with"""
    alone: bool = False
    """Whether the template takes but one call a message"""
    tagged: bool = False
    """Of mistral: NAME[ARGS]{…} for each call, in place of a list"""


class Call(NamedTuple):
    name: str
    arguments: str
    """JSON text"""


def style_of(tokenizer: Tokenizer) -> Style:
    """By the chat template."""
    template = str(tokenizer.inner.chat_template or "")
    special = tokenizer.special_ids
    marks = {m: special[m] for m in (_OPEN, _CLOSE, *_LISTS, _ARGUMENTS) if m in special}
    if not _writes_tools(tokenizer):
        return Style("hermes", False, marks)
    listed = next((mark for mark in _LISTS if mark in template), None)
    if listed is not None:
        return Style("mistral", True, marks, listed, tagged=_ARGUMENTS in template)
    if "<function=" in template:
        return Style("unread", True, marks)
    if _OPEN not in template and ('"parameters": ' in template or _PYTHON in template):
        return Style("llama", True, marks, alone="single tool-call" in template)
    return Style("hermes", True, marks)


def _writes_tools(tokenizer: Tokenizer) -> bool:
    """Whether a conversation is another text with a tool than without: the word alone says little."""
    if not tokenizer.has_template:
        return False
    tool = Tool(type="function", function=Function(name="look_up")).as_template_wants()
    messages = [{"role": "user", "content": "x"}]
    try:
        told, plain = (tokenizer.chat(messages, opens_reply=True, tools=t) for t in ([tool], []))
    except TextError:
        return False
    return told != plain


def new_id(style: Style) -> str:
    """Of a call."""
    if style.name == "mistral":  # its template takes no other
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


class ToolCalls:
    """Parts the text of one answer, piece by piece, into what is said and what is to be called.

    What looks like a call and is none stays text.
    """

    def __init__(self, style: Style, names: Sequence[str], most: int | None = None) -> None:
        """names: of the tools. most: calls that are given; later ones are left out."""
        self._style, self._names, self._most = style, frozenset(names), most
        self._called = 0
        self._held = ""
        """Text that was not given yet"""
        self._begun = False
        """Whether something else than white space was given"""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that this piece makes certain."""
        self._held += text
        if self._style.name == "llama":
            start = self._held.lstrip()
            tag = start[: len(_PYTHON)]
            if not self._begun and (tag.startswith("{") or _PYTHON.startswith(tag)):
                return "", []
            return self._say(self._held), []
        said, calls, mark = "", list[Call](), self._style.mark
        while True:
            before, found, inside = self._held.partition(mark)
            if not found:
                held = _overlap(before, mark)
                kept = before[: len(before) - held].rstrip()
                return said + self._say(kept), calls
            said += self._say(before.rstrip())
            within, closed, after = _closed(inside)
            if self._style.name == "mistral" or not closed:
                return said, calls
            made = _read_json(within)
            if made is None:
                said += self._say(self._held[: len(self._held) - len(after)])
            else:
                calls += self._given(made)
                self._held = after

    def close(self) -> tuple[str, list[Call]]:
        """What was held back, at the end of the text."""
        made: list[Call] | None = None
        held = self._held.strip()
        if self._style.name == "mistral" and held.startswith(self._style.mark):
            made = _read_list(held.removeprefix(self._style.mark), self._style.mark)
        elif self._style.name == "llama":
            made = _read_json(held.removeprefix(_PYTHON))
            if made is not None and not {call.name for call in made} <= self._names:
                made = None  # an answer in JSON
        if made is None:
            # white space behind a call is no answer
            return ("", []) if self._called and not held else (self._say(self._held), [])
        self._held = ""
        return "", self._given(made)

    def _given(self, made: list[Call]) -> list[Call]:
        given = made if self._most is None else made[: self._most - self._called]
        self._called += len(given)
        return given

    def _say(self, text: str) -> str:
        """Give text from the start of what is held."""
        self._held = self._held[len(text) :]
        if not self._begun:
            text = text if text.strip() else ""
        self._begun = self._begun or bool(text)
        return text


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may begin a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def _closed(inside: str) -> tuple[str, str, str]:
    """What is before the closing tag, the tag, and what is behind. One within a string is none."""
    at = inside.find(_CLOSE)
    while at >= 0:
        in_string = False
        for found in re.finditer(r'\\.|"', inside[:at], re.DOTALL):
            in_string ^= found[0] == '"'
        if not in_string:
            return inside[:at], _CLOSE, inside[at + len(_CLOSE) :]
        at = inside.find(_CLOSE, at + 1)
    return inside, "", ""


def _no_number(text: str) -> float:
    raise ValueError(text)


_DECODER = json.JSONDecoder(parse_constant=_no_number)  # NaN is no JSON


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _call_of(name: str, arguments: Any) -> Call | None:
    """None: arguments that are no object, or no Unicode."""
    if isinstance(arguments, str):  # JSON in JSON
        arguments = _json_object(arguments)
    if not isinstance(arguments, dict):
        return None
    made = Call(name, json.dumps(arguments, ensure_ascii=False))
    try:
        "".join(made).encode()
    except UnicodeEncodeError:  # half of a character
        return None
    return made


def _read_json(text: str) -> list[Call] | None:
    """Calls as JSON objects, or lists of them, one after the other, perhaps with semicolons between; None:
    it is something else."""
    at, made = 0, list[Call]()
    while at < len(text):
        if text[at] in " \t\r\n;,":
            at += 1
            continue
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                return None
            call = _call_of(one["name"], one.get("arguments", one.get("parameters")) or {})
            if call is None:
                return None
            made.append(call)
    return made or None


def _read_list(text: str, mark: str) -> list[Call] | None:
    """What Mistral's models write behind the mark: a list, or from 2025 on NAME[ARGS]{…} for each, some
    with a number of their own between."""
    if _ARGUMENTS not in text:
        return _read_json(text.replace(mark, " "))
    made = []
    for part in text.split(mark):
        name, _, arguments = part.partition(_ARGUMENTS)
        call = _call_of(name.partition(_NUMBER)[0].strip(), arguments.strip())
        if call is None:
            return None
        made.append(call)
    return made


def grammar(
    style: Style,
    tools: Sequence[Tool],
    *,
    forced: bool,
    several: bool,
    otherwise: dict[str, Any] | None = None,
) -> str:
    """What a text must follow that calls one of these tools. Raises InputError for schemas that cannot be.

    forced: it must call; otherwise it may say something, in any words or as the JSON schema `otherwise`.
    several: it may call more than once.
    """
    rules = [f"call_{i}: {_call(style, tool, forced)}" for i, tool in enumerate(tools)]
    rules.append("one: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    rest = _behind_the_mark(style, several=several and not style.alone)
    rules.append(
        f"calls: {rest if style.name == 'llama' else f'{_mark(style, style.mark)} {rest}'}"
    )
    rules += ["start: calls"] if forced else _or_said(style, otherwise, rest)
    return lark("%llguidance {}\n" + "\n".join(rules))


def _behind_the_mark(style: Style, *, several: bool) -> str:
    """What calls are, but for the mark that begins them."""
    mark = _mark(style, style.mark)

    def with_more(first: str, following: str) -> str:
        return first + (f" ({following}){{0,{_MOST_CALLS - 1}}}" if several else "")

    if style.name == "hermes":
        one = f'"\\n" one "\\n" {_mark(style, _CLOSE)}'
        return with_more(one, f'"\\n" {mark} {one}')
    if style.name == "llama":
        return with_more("one", '"; " one')
    if style.tagged:
        return with_more("one", f"{mark} one")
    return '"[" ' + with_more("one", '", " one') + ' "]"'


def _or_said(style: Style, otherwise: dict[str, Any] | None, rest: str) -> list[str]:
    """Rules of a text that may have calls. rest: of the calls, behind their mark."""
    if otherwise is not None:
        if style.name == "llama":
            raise InputError(
                "this model writes its calls as bare JSON, which response_format cannot be told from. Use "
                "tool_choice 'none' or 'required' with it."
            )
        form = json.dumps({**otherwise, "x-guidance": JSON_SPACING})
        return ["start: calls | said", f"said: %json {form}"]
    if style.name == "llama":
        return ["start: calls | SAID", "SAID: /([^{ \\n](.|\\n)*)?/"]
    said = "SAID: /(.|\\n)*/"
    if style.mark in style.special:
        return ["start: SAID | SAID calls", said]
    # the mark is found where the words end, so both are one rule
    return ["start: SAID | begun " + rest, f'begun[lazy]: SAID "{style.mark}"', said]


def _mark(style: Style, mark: str) -> str:
    """A mark in a grammar: a special token by its number."""
    return f"<[{style.special[mark]}]>" if mark in style.special else json.dumps(mark)


def _call(style: Style, tool: Tool, forced: bool) -> str:
    function = tool.function
    schema: dict[str, Any] = {"type": "object"}
    if forced or function.strict:
        schema = closed(function.parameters or {"type": "object", "properties": {}})
    arguments = f"%json {json.dumps({**schema, 'x-guidance': _SPACING})}"
    if style.tagged:
        return f"{json.dumps(function.name)} {_mark(style, _ARGUMENTS)} {arguments}"
    key = "parameters" if style.name == "llama" else "arguments"
    before = json.dumps(f'{{"name": {json.dumps(function.name)}, "{key}": ')
    return f'{before} {arguments} "}}"'


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose objects have no other properties than it names, unless it says otherwise: a small
    model goes on inventing some for ever."""
    made = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(made.get(key), dict):
            made[key] = {n: closed(s) if isinstance(s, dict) else s for n, s in made[key].items()}
    if isinstance(made.get("items"), dict):
        made["items"] = closed(made["items"])
    if "properties" in made and not _OPENING & made.keys():
        made["additionalProperties"] = False
    return made


def in_words(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: they are described in the system's message, calls
    and results are written into the others."""
    made: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            said = f"<tool_response>\n{content}\n</tool_response>"
            if made and made[-1].get("of_tools"):
                made[-1]["content"] += f"\n{said}"
            else:
                made.append({"role": "user", "content": said, "of_tools": True})
            continue
        calls = [
            f"{_OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{_CLOSE}"
            for call in message.get("tool_calls", ())
        ]
        if message["role"] == "user" and made and made[-1].get("of_tools"):  # roles alternate
            made[-1]["content"] += f"\n{content}"
            continue
        others = {key: value for key, value in message.items() if key != "tool_calls"}
        made.append(others | {"content": "\n".join(filter(None, [content, *calls]))})
    if tools:
        known = [json.dumps(t.as_template_wants()["function"], ensure_ascii=False) for t in tools]
        told = (
            "You can call functions. Each of these lines describes one:\n<tools>\n"
            + "\n".join(known)
            + "\n</tools>\nTo call one, answer with its name and its arguments as JSON:\n<tool_call>\n"
            '{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>'
        )
        if made and made[0]["role"] == "system":
            made[0] = made[0] | {"content": f"{made[0]['content']}\n\n{told}"}
        else:
            made.insert(0, {"role": "system", "content": told})
    return [{key: value for key, value in one.items() if key != "of_tools"} for one in made]
