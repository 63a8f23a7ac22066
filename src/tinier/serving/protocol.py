"""Bodies of OpenAI's completions and chat completions, in and out.

Fields, defaults and limits are OpenAI's (https://platform.openai.com/docs/api-reference); those past them
are vLLM's: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids; and `timeout`.
"""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tinier.engine import SamplingParams, TokenLogprobs
from tinier.engine.request import MAX_LOGPROBS

_Text = Annotated[str, Field(max_length=4_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[dict[str, _Bias], Field(max_length=1024)]
_Tokens = Annotated[list[_Token], Field(min_length=1, max_length=2**20)]


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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _Generation(BaseModel):
    """What completions and chat completions share."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=300)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: _Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=64)] | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds until the request is given up"""

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
                400, "logit_bias has a key that is no token id.", param="logit_bias"
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
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


_Prompt = (
    _Text
    | Annotated[list[_Text], Field(min_length=1, max_length=128)]
    | _Tokens
    | Annotated[list[_Tokens], Field(min_length=1, max_length=128)]
)


class CompletionBody(_Generation):
    prompt: _Prompt
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        alone = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if alone else prompt


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: _Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(max_length=1000)]
    name: Annotated[str, Field(max_length=100)] | None = None

    def as_template_wants(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ResponseFormat(BaseModel):
    type: Literal["text"]


class ChatBody(_Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None


class LoadBody(BaseModel):
    """Of `POST /v1/models/load`: as `tinier serve` takes them, NAME=MODEL."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=300)]


def usage(prompt: int, cached: int, output: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


class CompletionLogprobs:
    """The `logprobs` of a completion, made token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def take(self, tokens: list[TokenLogprobs], *, first_is_bare: bool = False) -> dict[str, Any]:
        """first_is_bare: the first is the beginning of a prompt, which nothing predicts."""
        made: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for i, one in enumerate(tokens):
            bare = first_is_bare and i == 0
            text = self._tokenizer.decode([one.token])
            made["tokens"].append(text)
            made["token_logprobs"].append(None if bare else _finite(one.logprob))
            top = {
                self._tokenizer.decode([token]): _finite(value) for token, value in one.top.items()
            }
            made["top_logprobs"].append(None if bare else top)
            made["text_offset"].append(self._offset)
            self._offset += len(text)
        return made


def chat_logprobs(tokenizer: Any, tokens: list[TokenLogprobs]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

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
