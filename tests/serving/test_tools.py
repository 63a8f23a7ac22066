"""Tools: how calls are written by each family, found in a text however it comes, and forced."""

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from tests.conftest import byte_tokenizer
from tests.serving.conftest import ENGINE, write_model

from tinier.engine.grammar import Grammars
from tinier.errors import InputError
from tinier.serving import ServeConfig, Service
from tinier.serving.protocol import ChatBody, conversation_text
from tinier.serving.tools import Call, Style, Tool, ToolCalls, closed, grammar, style_of
from tinier.tokenizer import Tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Of a city",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/n"}},
            "required": ["city", "days"], "additionalProperties": False,
            "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
ROME, TIME = ('{"city": "Rome", "days": 3}', "{}")
HERMES, LLAMA, MISTRAL = (
    Style("hermes", True, {}),
    Style("llama", True, {}),
    Style("mistral", True, {}, "[TOOL_CALLS]"),
)
GRANITE = Style("mistral", True, {}, "<|tool_call|>")

TEXTS = [
    # style, text, what is said, what is called
    (HERMES, "It rains.", "It rains.", []),
    (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>', "", [("weather", ROME)]),
    (HERMES, f'I look. \n<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>\n'
     '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n', "I look.", [("weather", ROME), ("now", TIME)]),
    (HERMES, f'<tool_call>[{{"name": "weather", "arguments": {ROME}}}, {{"name": "now"}}]</tool_call>', "",
     [("weather", ROME), ("now", TIME)]),
    (HERMES, "<tool_call>not JSON</tool_call> so", "<tool_call>not JSON</tool_call> so", []),
    (HERMES, '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
    (HERMES, "a <tool b", "a <tool b", []), (HERMES, "ends <tool_", "ends <tool_", []),
    (HERMES, "", "", []),
    (LLAMA, f'{{"name": "weather", "parameters": {ROME}}}', "", [("weather", ROME)]),
    (LLAMA, f'<|python_tag|>{{"name": "weather", "parameters": {ROME}}}; {{"name": "now", "parameters": {{}}}}', "",
     [("weather", ROME), ("now", TIME)]),
    (LLAMA, '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    (LLAMA, '{"a": 1}', '{"a": 1}', []), (LLAMA, "{ so", "{ so", []), (LLAMA, "  It rains.", "  It rains.", []),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "weather", "arguments": {ROME}}}]', "", [("weather", ROME)]),
    (MISTRAL, f"Well [TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]now[ARGS]{{}}", "Well",
     [("weather", ROME), ("now", TIME)]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "x </tool_call> \\" y"}}</tool_call>', "",
     [("now", '{"a": "x </tool_call> \\" y"}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
     '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>',
     '<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
    (HERMES, "<tool_call>" + "[" * 20_000 + "</tool_call>", "<tool_call>" + "[" * 20_000 + "</tool_call>", []),
    (MISTRAL, f"[TOOL_CALLS]weather[CALL_ID]a1b2c3[ARGS]{ROME}", "", [("weather", ROME)]),
    (GRANITE, f'<|tool_call|>[{{"name": "weather", "arguments": {ROME}}}]', "", [("weather", ROME)]),
    (MISTRAL, "[TOOL_CALLS]what", "[TOOL_CALLS]what", []), (MISTRAL, "[TOOL] box", "[TOOL] box", []),
]  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 2, 5, 1000])
@pytest.mark.parametrize(("style", "text", "said", "called"), TEXTS)
def test_calls_are_found_however_a_text_comes(
    style: Style, text: str, said: str, called: list[tuple[str, str]], pieces: int
) -> None:
    draw = random.Random(pieces)
    for _ in range(5):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(pieces))
        parser = ToolCalls(style, ["weather", "now"])
        given = [
            parser.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        given.append(parser.close())
        assert "".join(words for words, _ in given) == said
        assert [call for _, calls in given for call in calls] == [Call(*one) for one in called]


def test_no_more_calls_than_asked_for() -> None:
    parser = ToolCalls(HERMES, ["now"], most=1)
    _, calls = parser.push('<tool_call>{"name": "now"}</tool_call>' * 3)
    assert calls == [Call("now", "{}")]


def accepts(style: Style, text: str, **options: Any) -> bool:
    tokenizer = Tokenizer(byte_tokenizer())
    tools = [Tool(**one) for one in TOOLS]
    followed = grammar(style, tools, **options)
    matcher = Grammars(tokenizer, 264, torch.device("cpu")).matcher(followed, (257,))
    ids = tokenizer.encode(text, special=False)
    return all(matcher.consume_token(token) for token in ids) and matcher.is_accepting()


WRITTEN: list[tuple[Style, str, str]] = [
    # style, a call of weather with {}, and that of now behind it
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
     '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
    (LLAMA, '{"name": "weather", "parameters": %s}', '; {"name": "now", "parameters": {}}'),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": %s}', ', {"name": "now", "arguments": {}}]'),
]  # fmt: skip


@pytest.mark.parametrize(("style", "one", "more"), WRITTEN)
def test_calls_can_be_forced(style: Style, one: str, more: str) -> None:
    alone = one + ("]" if style is MISTRAL else "")
    for several in (True, False):
        forced = {"forced": True, "several": several}
        assert accepts(style, alone % ROME, **forced)
        assert accepts(style, one % ROME + more, **forced) == several
        assert not accepts(style, alone % '{"city": "Rome"}', **forced)
        assert not accepts(style, alone % '{"city": "Bonn", "days": 1}', **forced)
        assert not accepts(style, "It rains.", **forced)
    free = {"forced": False, "several": True}
    assert accepts(style, "It rains.", **free)
    assert accepts(style, alone % ROME, **free)
    # as the grammar has it, so the parser reads it
    parser = ToolCalls(style, ["weather", "now"])
    pushed, closed = parser.push(one % ROME + more), parser.close()
    assert pushed[1] + closed[1] == [Call("weather", ROME), Call("now", "{}")]
    assert pushed[0] + closed[0] == ""


def test_arguments_have_no_other_names_than_the_schema() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    either = {"properties": {}, "anyOf": [{"required": ["b"]}]}
    schema = {"type": "object", "properties": {"list": {"type": "array", "items": inner}, "free": either,
              "map": {"type": "object", "additionalProperties": {"type": "string"}}}}  # fmt: skip
    made = closed(schema)
    assert made["additionalProperties"] is False
    properties = made["properties"]
    assert properties["list"]["items"] == inner | {"additionalProperties": False}
    assert properties["free"] == either
    assert properties["map"] == schema["properties"]["map"]  # type: ignore[index]
    assert "additionalProperties" not in schema


@pytest.mark.parametrize("forced", [True, False])
def test_marks_may_be_special_tokens(forced: bool) -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    mark, number = next((text, i) for text, i in tokenizer.special_ids.items() if i != 257)
    style = Style("mistral", True, {mark: number}, mark)
    followed = grammar(style, [Tool(**one) for one in TOOLS], forced=forced, several=True)
    text = f'[{{"name": "weather", "arguments": {ROME}}}]'
    for words, right in (("", True), ("Well ", not forced)):
        matcher = Grammars(tokenizer, 264, torch.device("cpu")).matcher(followed, (257,))
        ids = [
            *tokenizer.encode(words, special=False),
            number,
            *tokenizer.encode(text, special=False),
        ]
        assert all(matcher.consume_token(token) for token in ids) == right
        assert matcher.is_accepting() == right


def test_strict_tools_are_followed_where_the_model_chooses() -> None:
    tools = [Tool(**{**WEATHER, "function": WEATHER["function"] | {"strict": True}})]
    tokenizer = Tokenizer(byte_tokenizer())
    grammars = Grammars(tokenizer, 264, torch.device("cpu"))
    for style, one, _ in WRITTEN:
        followed = grammar(style, tools, forced=False, several=True)
        for arguments, right in ((ROME, True), ('{"city": "Bonn", "days": 1}', False)):
            matcher = grammars.matcher(followed, (257,))
            text = one % arguments + ("]" if style is MISTRAL else "")
            ids = tokenizer.encode(text, special=False)
            assert all(matcher.consume_token(token) for token in ids) == right


def test_an_answer_may_be_a_form_beside_calls() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    options: dict[str, Any] = {"forced": False, "several": True, "otherwise": schema}
    for style, one, more in (WRITTEN[0], WRITTEN[2]):
        assert accepts(style, '{"a": 3}', **options)
        assert accepts(style, one % ROME + more, **options)
        assert not accepts(style, "It rains.", **options)
    with pytest.raises(InputError, match="bare JSON"):
        accepts(LLAMA, "", **options)


QWEN = (
    "{% if tools %}<tools>{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ROME}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Sun"}]},
]  # fmt: skip


def templated(template: str) -> Tokenizer:
    inner = byte_tokenizer()
    inner.chat_template = template
    return Tokenizer(inner)


def text_of(template: str, **fields: Any) -> str:
    tokenizer = templated(template)
    body = ChatBody.model_validate({"model": "x", "messages": HISTORY, "tools": TOOLS} | fields)
    return conversation_text(tokenizer, body, style_of(tokenizer))


def test_a_template_that_knows_tools_is_given_them() -> None:
    said = "<user>Rain?<assistant><tool_call>weather Rome</tool_call><tool weather>Sun<assistant>"
    assert text_of(QWEN) == "<tools>weather,now</tools>" + said
    one = {"type": "function", "function": {"name": "now"}}
    assert text_of(QWEN, tool_choice=one) == "<tools>now</tools>" + said
    assert text_of(QWEN, tool_choice="none") == said


def test_a_template_that_knows_none_is_told_in_words() -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    text = text_of(plain)
    assert text.startswith("[system]You can call functions.")
    assert '{"name": "weather", "description": "Of a city", "parameters": {' in text
    assert (
        "[user]Rain?[assistant]<tool_call>\n"
        f'{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'
        "[user]<tool_response>\nSun\n</tool_response>"
    ) in text
    told = [{"role": "system", "content": "Be brief."}, *HISTORY]
    assert text_of(plain, messages=told).startswith("[system]Be brief.\n\nYou can call functions.")
    assert "You can call" not in text_of(plain, tool_choice="none")


def test_styles_are_known_by_the_template() -> None:
    for template, name, known in (
        (QWEN, "hermes", True), ("{{ messages }}", "hermes", False),
        ('{{ tools }} {"name": NAME, "parameters": {}}', "llama", True), ("{{ tools }}[TOOL_CALLS]", "mistral", True),
    ):  # fmt: skip
        style = style_of(templated(template))
        assert (style.name, style.known) == (name, known)


def test_one_call_at_a_time_where_the_template_takes_no_more() -> None:
    template = (
        '{% if tools %}{{ tools }} {"name": NAME, "parameters": {}}{% endif %}{% for m in messages %}'
        "{% if m.tool_calls and m.tool_calls | length != 1 %}"
        "{{ raise_exception('only single tool-calls at once') }}{% endif %}{% endfor %}"
    )
    style = style_of(templated(template))
    assert (style.name, style.alone) == ("llama", True)
    _, one, more = WRITTEN[1]
    tokenizer = Tokenizer(byte_tokenizer())
    followed = grammar(style, [Tool(**t) for t in TOOLS], forced=True, several=True)
    matcher = Grammars(tokenizer, 264, torch.device("cpu")).matcher(followed, (257,))
    ids = tokenizer.encode(one % ROME + more, special=False)
    assert not all(matcher.consume_token(token) for token in ids)


def test_a_word_in_the_template_is_no_knowledge_of_tools() -> None:
    assert not style_of(templated("{% for m in messages %}{{ m['tools'] }}x{% endfor %}")).known
    assert style_of(templated("{{ tools }}<function=NAME>")).name == "unread"
    granite = style_of(templated("{{ tools }}<|tool_call|>"))
    assert (granite.name, granite.mark) == ("mistral", "<|tool_call|>")


def test_roles_alternate_where_tools_are_told_in_words() -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    text = text_of(plain, messages=[*HISTORY, {"role": "user", "content": "And Oslo?"}])
    assert "\n</tool_response>\nAnd Oslo?" in text
    assert text.count("[user]") == 2


def test_an_answer_s_form_has_no_endless_white_space() -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    options: dict[str, Any] = {"forced": False, "several": True, "otherwise": schema}
    assert accepts(HERMES, "{ }", **options)
    assert not accepts(HERMES, "{" + " " * 200 + "}", **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = write_model(tmp_path_factory.mktemp("tools") / "one", template=QWEN)
    with Service([f"one={folder}"], ENGINE, ServeConfig(port=0)) as running:
        yield running


ASKED: dict[str, Any] = {
    "model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150, "temperature": 1,
    "seed": 1, "tools": [WEATHER],
}  # fmt: skip


def answer(served: Service, **fields: Any) -> dict[str, Any]:
    made = httpx.post(f"{served.url}/v1/chat/completions", json=ASKED | fields, timeout=60)
    assert made.status_code == 200, made.text
    choice: dict[str, Any] = made.json()["choices"][0]
    return choice


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_is_forced_and_can_be_answered(served: Service, choice: Any) -> None:
    made = answer(served, tool_choice=choice, parallel_tool_calls=False)
    assert made["finish_reason"] == "tool_calls"
    assert made["message"]["content"] is None
    (call,) = made["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["city"] in ("Rome", "Oslo")
    assert 0 <= arguments["days"] <= 9
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Sun"}
    history = [*ASKED["messages"], made["message"], result]
    after = answer(served, messages=history, max_tokens=5)
    assert after["message"]["content"]
    assert "tool_calls" not in after["message"]


def test_the_openai_client_streams_calls(served: Service) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    asked = ASKED | {"tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        made = stream.get_final_completion().choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.tool_calls
    (call,) = made.message.tool_calls
    whole = answer(served, tool_choice="required", parallel_tool_calls=False)
    (same,) = whole["message"]["tool_calls"]
    assert call.function.arguments == same["function"]["arguments"]
    assert call.id.startswith("call_")


def test_without_a_call_the_answer_is_text(served: Service) -> None:
    with_tools = answer(served, max_tokens=20, temperature=0, ignore_eos=True)
    assert with_tools["finish_reason"] == "length"
    without = answer(served, max_tokens=20, temperature=0, ignore_eos=True, tool_choice="none")
    assert with_tools["message"].keys() == without["message"].keys()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools has 'weather' twice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rain"}}}, "not among tools: weather"),
        ({"tools": [], "tool_choice": "required"}, "'required' needs tools"),
        ({"guided_regex": "a"}, "guided_regex does not go with tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has a tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "has no content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": HISTORY[1]["tool_calls"]}]},
         "are an assistant's"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
         "are no JSON object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "bird"}}}],
          "tool_choice": "required"}, "tools: this grammar cannot be followed"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "name"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}]}]},
         "are no JSON object"),
        ({"functions": [{"name": "f"}]}, "'functions' asks for something"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(served: Service, fields: dict[str, Any], said: str) -> None:
    made = httpx.post(f"{served.url}/v1/chat/completions", json=ASKED | fields, timeout=60)
    assert made.status_code == 400
    assert said in made.json()["error"]["message"]


def test_thoughts_stay_thoughts_where_a_strict_tool_may_be_called(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    template = QWEN + "{% if add_generation_prompt %}<think>{% endif %}"
    folder = write_model(tmp_path_factory.mktemp("thinking") / "one", template=template)
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    with Service([f"one={folder}"], ENGINE, ServeConfig(port=0)) as running:
        thinking = answer(running, tools=[strict], max_tokens=10, ignore_eos=True)["message"]
        assert thinking["reasoning_content"]
        assert not thinking["content"]
        forced = answer(running, tools=[strict], tool_choice="required", max_tokens=150)["message"]
        assert forced["reasoning_content"] is None
        assert forced["tool_calls"]


def test_completions_know_no_tools(served: Service) -> None:
    asked = {"model": "one", "prompt": "x", "tools": TOOLS}
    made = httpx.post(f"{served.url}/v1/completions", json=asked)
    assert "'tools' asks for something" in made.json()["error"]["message"]
