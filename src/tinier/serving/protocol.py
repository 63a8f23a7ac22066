"""Bodies of OpenAI's completions and chat completions, in and out.

Fields, defaults and limits are OpenAI's (https://platform.openai.com/docs/api-reference); those past them
are vLLM's: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, skip_special_tokens,
include_stop_str_in_output, return_token_ids, add_generation_prompt, continue_final_message,
chat_template_kwargs, structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar; and
`timeout`.
"""

import codecs
import json
import secrets
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tinier.engine import SamplingParams, TokenLogprobs
from tinier.engine.grammar import choice, json_schema, lark, regex
from tinier.engine.request import MAX_LOGPROBS, MAX_STOPS
from tinier.errors import InputError
from tinier.serving.tools import CalledTool, NamedTool, Style, Tool, in_words
from tinier.tokenizer import Tokenizer

_Text = Annotated[str, Field(max_length=4_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[dict[str, _Bias], Field(max_length=1024)]
_Tokens = Annotated[list[_Token], Field(min_length=1, max_length=2**20)]
_MaxTokens = Annotated[int, Field(ge=-1, lt=2**31)]
"""-1: as many as fit"""


class ApiError(Exception):
    """An answer with an HTTP status and OpenAI's error body."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error",
        param: str | None = None, code: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# fields of OpenAI's and vLLM's that ask for what is not done here, with the values that do not ask for it;
# () beside null means any value: it is a label, or a hint
_Neutral = dict[str, tuple[object, ...]]
_REQUEST: _Neutral = {
    "functions": ([],), "function_call": ("none", "auto"),
    "service_tier": ("auto", "default"), "reasoning_effort": ("none",), "verbosity": ("medium",),
    "modalities": (["text"],), "audio": (None,), "prediction": (None,), "web_search_options": (None,),
    "store": (False,), "metadata": (), "user": (), "safety_identifier": (), "prompt_cache_key": (),
    "prompt_cache_retention": (), "suffix": ("",), "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "chat_template": (None,),
    "logits_processors": ([],), "guided_decoding_backend": (), "guided_whitespace_pattern": (None,),
}  # fmt: skip
_OTHER_FORMS = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip
_OF_CHATS: _Neutral = {
    "add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template_kwargs": ({},),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
}  # fmt: skip
_MESSAGE: _Neutral = {
    "function_call": (None,), "audio": (None,), "annotations": (), "reasoning": (),
}  # fmt: skip
_PART: _Neutral = {"cache_control": (), "prompt_cache_breakpoint": ()}
_STREAM: _Neutral = {"include_obfuscation": (False,)}


def settle(values: Any, neutral: _Neutral, where: str = "") -> Any:
    """An object without the known fields that ask for nothing. Raises ApiError for those that do."""
    if not isinstance(values, dict):
        return values
    for name in values.keys() & neutral.keys():
        allowed = neutral[name]
        if values[name] is not None and allowed and values[name] not in allowed:
            words = " or ".join(json.dumps(value) for value in allowed if value is not None)
            raise ApiError(
                400,
                f"'{name}' asks for something that this server does not do. Leave it out"
                f"{f', or use {words}' if words else ''}.",
                param=where + name,
            )
    return {name: value for name, value in values.items() if name not in neutral}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return settle(values, _STREAM, "stream_options.")


class JsonSchema(BaseModel):
    """Of a response_format."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=300)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """The answer follows the schema, whatever this says"""


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(
                400,
                "response_format 'json_schema', and no other, has a json_schema.",
                param="response_format",
            )
        return self


class StructuredOutputs(BaseModel):
    """As vLLM has them: one of these."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: _Text | None = None
    choice: Annotated[list[_Text], Field(min_length=1, max_length=1000)] | None = None
    grammar: _Text | None = None


class _Generation(BaseModel):
    """What completions and chat completions share."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=300)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: _Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=64)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: _Text | None = None
    guided_choice: Annotated[list[_Text], Field(min_length=1, max_length=1000)] | None = None
    guided_grammar: _Text | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds until the request is given up"""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return settle(values, _REQUEST)

    def grammar(self) -> str | None:
        """What the text must follow; None: nothing. Raises ApiError. May take a second."""
        form, output = self.response_format, self.structured_outputs or StructuredOutputs()
        schema = form.json_schema.schema_ if form and form.json_schema else None
        any_object = {"type": "object"}
        given: list[tuple[str, Callable[[Any], str], Any]] = [
            ("response_format", json_schema, schema),
            ("response_format", json_schema, any_object if form and form.type == "json_object" else None),
            ("structured_outputs", json_schema, output.json_),
            ("structured_outputs", json_schema, any_object if output.json_object else None),
            ("structured_outputs", regex, output.regex),
            ("structured_outputs", choice, output.choice),
            ("structured_outputs", lark, output.grammar),
            ("guided_json", json_schema, self.guided_json),
            ("guided_regex", regex, self.guided_regex),
            ("guided_choice", choice, self.guided_choice),
            ("guided_grammar", lark, self.guided_grammar),
        ]  # fmt: skip
        asked = [(name, make, value) for name, make, value in given if value is not None]
        if len(asked) > 1:
            names = " and ".join(sorted({name for name, *_ in asked}))
            raise ApiError(400, f"{names} ask for more than one form. Use one.", param=asked[1][0])
        if not asked:
            return None
        name, make, value = asked[0]
        try:
            return make(value)
        except InputError as error:
            raise ApiError(400, f"{name}: {error}", param=name) from None

    def sampling(
        self, max_tokens: int, end_ids: tuple[int, ...], logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:  # fmt: skip
        """Raises InputError, or ApiError for a bias of what is no token."""
        stop = self.stop or []
        ends = set(self.stop_token_ids or ()) | (set() if self.ignore_eos else set(end_ids))
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(
                400,
                'logit_bias has a key that is no token id. Use numbers, such as {"1000": -100}.',
                param="logit_bias",
            ) from None
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            seed=secrets.randbits(48) if self.seed is None else self.seed,
            n=self.n or 1,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(sorted(ends)),
            skip_special_tokens=self.skip_special_tokens is not False,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


_Prompt = (
    _Text
    | Annotated[list[_Text], Field(min_length=1, max_length=128)]
    | _Tokens
    | Annotated[list[_Tokens], Field(min_length=1, max_length=128)]
)


class CompletionBody(_Generation):
    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        return settle(values, _OF_CHATS)

    prompt: _Prompt
    max_tokens: _MaxTokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return _several(self.prompt)


def _several(prompt: Any) -> list[str | list[int]]:
    """A text, ids or a list of either as a list."""
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if alone else prompt


def refusal_as_text(values: dict[str, Any]) -> dict[str, Any]:
    """A part in which a model declined, as one of text."""
    if "refusal" not in values:
        return values
    others = {name: value for name, value in values.items() if name != "refusal"}
    return {**others, "text": values["refusal"]}


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "refusal"]
    text: _Text

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(kind := values.get("type"), str):
            if kind not in ("text", "refusal"):
                raise ApiError(
                    400, f"This server takes parts of type 'text', not {kind!r}.", param="messages"
                )
            if kind == "refusal":
                values = refusal_as_text(values)
        return settle(values, _PART)


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")  # clients keep notes of their own in them

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | Annotated[list[TextPart], Field(max_length=1000)] | None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128)] | None = None
    """Of an assistant, which then may have no content"""
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    """Of the call that a tool's message answers"""
    reasoning_content: _Text | None = None
    """What an earlier answer thought, for templates that show it"""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """As answers carry them: what a model said, or how it declined."""
        values = settle(values, _MESSAGE, "messages.")
        if isinstance(values, dict) and "refusal" in values:
            values = dict(values)
            refusal = values.pop("refusal")
            if values.get("content") is None and isinstance(refusal, str):
                values["content"] = refusal
        if isinstance(values, dict) and values.get("tool_calls"):
            values = {"content": None, **values}
        return values

    @model_validator(mode="after")
    def _whole(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ApiError(
                400, f"tool_calls are an assistant's, not a {self.role}'s.", param="messages"
            )
        if self.content is None and not self.tool_calls:
            raise ApiError(
                400, f"The {self.role}'s message has no content. Send a text.", param="messages"
            )
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ApiError(
                400, "A message of role 'tool', and no other, has a tool_call_id.", param="messages"
            )
        return self

    def as_template_wants(self) -> dict[str, Any]:
        """Raises InputError for calls whose arguments are no JSON."""
        content = self.content or ""
        if not isinstance(content, str):  # joined as vLLM joins them
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_wants() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


_Tools = Annotated[list[Tool], Field(max_length=128)]
_Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]
_Variables = Annotated[dict[str, Any], Field(max_length=64)]


class ChatBody(_Generation):
    messages: _Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: _Variables | None = None
    tools: _Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """None: auto"""
    parallel_tool_calls: bool | None = None
    max_tokens: _MaxTokens | None = None
    max_completion_tokens: _MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _tools_and_choice(self) -> "ChatBody":
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ApiError(
                400, f"tools has {twice!r} twice. Give each its own name.", param="tools"
            )
        choice = self.tool_choice
        if choice == "required" and not names:
            raise ApiError(
                400, "tool_choice 'required' needs tools. Give some.", param="tool_choice"
            )
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(
                400,
                f"tool_choice names {choice.function.name!r}, which is not among tools"
                f"{': ' + ', '.join(names) if names else ''}.",
                param="tool_choice",
            )
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        if self.tool_choice == "none":
            return []
        chosen = self.tool_choice
        return [
            tool
            for tool in self.tools or ()
            if not isinstance(chosen, NamedTool) or tool.function.name == chosen.function.name
        ]

    @property
    def must_call(self) -> bool:
        return bool(self.offered) and self.tool_choice not in (None, "auto")

    @property
    def may_say_anything(self) -> bool:
        """Whether tools are offered, and beside calls the answer has no form."""
        return bool(self.offered) and not self.must_call and self.answer_schema() is None

    def answer_schema(self) -> dict[str, Any] | None:
        """What response_format asks of an answer beside tools. Raises ApiError for other forms."""
        for name in _OTHER_FORMS:
            if getattr(self, name) is not None:
                raise ApiError(
                    400,
                    f"{name} does not go with tools. Use response_format, or tool_choice 'none'.",
                    param=name,
                )
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        return {"type": "object"} if schema is None else schema.schema_


class TokenizeBody(BaseModel):
    """Of `POST /tokenize`, as vLLM has it: a text, or a conversation."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=300)] | None = None
    prompt: _Text | None = None
    add_special_tokens: bool | None = None
    """True for a text, whose BOS is set in front; False for a conversation, whose template writes it"""
    return_token_strs: bool | None = None
    messages: _Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: _Variables | None = None
    tools: _Tools | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return settle(values, _REQUEST)

    @property
    def offered(self) -> list[Tool]:
        """The tools that the conversation's text tells of."""
        return self.tools or []

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "Give either prompt or messages.", param="prompt")
        if self.tools and self.messages is None:
            raise ApiError(400, "tools go with messages, not with a prompt.", param="tools")
        return self


class DetokenizeBody(BaseModel):
    """Of `POST /detokenize`, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=300)] | None = None
    tokens: Annotated[list[_Token], Field(max_length=2**20)]


def conversation_text(tokenizer: Tokenizer, body: ChatBody | TokenizeBody, style: Style) -> str:
    """The messages and tools as the model's template writes them.

    Raises ApiError, InputError, TextError.
    """
    messages = body.messages or []
    continues = bool(body.continue_final_message)
    opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if continues and opens:
        raise ApiError(
            400,
            "continue_final_message goes on with the last message, and add_generation_prompt opens "
            "another. Leave one of them out.",
            param="continue_final_message",
        )
    if continues and messages[-1].role != "assistant":
        raise ApiError(
            400,
            "continue_final_message goes on with what the assistant said, and the last message is the "
            f"{messages[-1].role}'s. Leave it out, or send the beginning of an answer last.",
            param="messages",
        )
    written, tools = _named([message.as_template_wants() for message in messages]), body.offered
    if not style.known:
        written, tools = in_words(written, tools), []
    return tokenizer.chat(
        written, opens_reply=opens, continues=continues, variables=body.chat_template_kwargs or {},
        tools=[tool.as_template_wants() for tool in tools],
    )  # fmt: skip


def _named(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the name of the function in each tool's message: some templates show it."""
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls", ())
    }
    return [
        message | {"name": names[message["tool_call_id"]]}
        if message.get("tool_call_id") in names
        else message
        for message in messages
    ]


class EmbeddingsBody(BaseModel):
    """Of `POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=300)]
    input: _Prompt
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    """Of the hidden states; None: mean"""
    timeout: Annotated[float, Field(gt=0)] | None = None
    stream: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return settle(
            values, {"user": (), "dimensions": (None,), "truncate_prompt_tokens": (None,)}
        )

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


class LoadBody(BaseModel):
    """Of `POST /v1/models/load`: as `tinier serve` takes them, NAME=MODEL."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=300)]


def usage(
    prompt: int, cached: int, output: int, drafted: int = 0, accepted: int = 0,
    thought: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """thought: output tokens that are thoughts; None: the model has none."""
    counts = {
        "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip
    details = {} if thought is None else {"reasoning_tokens": thought}
    if drafted:  # OpenAI's names for what a prediction did
        details |= {
            "accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted,
        }  # fmt: skip
    return counts | ({"completion_tokens_details": details} if details else {})


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """How a token is shown: its text, or `bytes:\\xf0\\x9f` for part of a character, as OpenAI has it."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """The `logprobs` of a completion, made token by token."""

    def __init__(self, tokenizer: Tokenizer, skips: bool = True) -> None:
        """skips: special tokens are no part of the text; else only the one that begins a prompt."""
        self._tokenizer = tokenizer
        self._skips = skips
        self._special = frozenset(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        """Characters that were complete before the next token"""
        self._begun = False

    def take(self, tokens: list[TokenLogprobs], *, first_is_bare: bool = False) -> dict[str, Any]:
        """first_is_bare: the first is the beginning of a prompt, which nothing predicts."""
        made: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for i, one in enumerate(tokens):
            bare = first_is_bare and i == 0
            made["tokens"].append(token_text(self._tokenizer, one.token))
            made["token_logprobs"].append(None if bare else _finite(one.logprob))
            made["top_logprobs"].append(None if bare else self._top(one.top))
            made["text_offset"].append(self._offset)
            if one.token not in self._special or not (self._skips or bare):
                self._advance(one.token)
        return made

    def _top(self, top: dict[int, float]) -> dict[str, float]:
        """By text; a second token of the same text goes by its number."""
        made: dict[str, float] = {}
        for token, value in top.items():
            text = token_text(self._tokenizer, token)
            made[f"token_id:{token}" if text in made else text] = _finite(value)
        return made

    def _advance(self, token: int) -> None:
        raw = self._tokenizer.token_bytes(token)
        if not self._begun:
            self._begun = True
            if raw.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
                raw = raw[1:]  # a tokenizer that drops the first space of a text
        self._offset += len(self._decoder.decode(raw))


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TokenLogprobs]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token), "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }  # fmt: skip

    return {
        "content": [
            entry(one.token, one.logprob)
            | {"top_logprobs": [entry(*pair) for pair in one.top.items()]}
            for one in tokens
        ]
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
