"""From a request body to text: what the completion endpoints share and where they differ.

Start at `start_completion` and `start_chat`, which raise before anything is computed; `Generation.whole`
and `Generation.events` then give the answer.
"""

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tinier.engine import Limits, TokenLogprobs
from tinier.engine.text import TextStream
from tinier.errors import InputError
from tinier.serving.model import Delta, Job, Model
from tinier.serving.protocol import (
    DONE,
    ApiError,
    ChatBody,
    CompletionBody,
    CompletionLogprobs,
    chat_logprobs,
    conversation_text,
    event,
    usage,
)
from tinier.serving.thinking import OPEN, Thoughts, num_thought_tokens
from tinier.serving.tools import Call, NamedTool, ToolCalls, grammar, new_id

# texts above this are tokenized beside the event loop
_LONG_TEXT = 4096


class Choice:
    """One output on its way to text."""

    def __init__(
        self, index: int, job: Job, model: Model, *, includes_stop: bool = False, prefix: str = "",
        is_prompt_alone: bool = False,
    ) -> None:  # fmt: skip
        self.index = index
        self.job = job
        self.prefix = prefix
        """What goes before the text: the prompt, where it is echoed"""
        self._is_prompt_alone = is_prompt_alone
        """Only the prompt was asked about: the token that is computed behind it is not given"""
        self._stop = job.params.stop
        self._tokenizer = model.tokenizer
        self._skips = job.params.skip_special_tokens
        self._stream = TextStream(
            model.tokenizer, self._stop, job.params.min_tokens, skip_special_tokens=self._skips,
            include_stop=includes_stop,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """Output tokens of the answer."""
        return 0 if self._is_prompt_alone else self.job.num_tokens

    def push(self, delta: Delta) -> str:
        piece = self._stream.push(*delta.tokens)
        if delta.finished is not None:
            piece += self._stream.close()
        prefix, self.prefix = self.prefix, ""
        return prefix + piece

    def deltas(self) -> AsyncIterator[Delta]:
        """What comes of it."""
        return self._of_prompt() if self._is_prompt_alone else self.job.deltas()

    async def _of_prompt(self) -> AsyncIterator[Delta]:
        async for delta in self.job.deltas():
            yield Delta([], [], "length" if delta.finished else None)

    async def whole(self) -> tuple[str, Delta]:
        """The text, and all deltas as one."""
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        async for delta in self.deltas():
            tokens += delta.tokens
            logprobs += delta.logprobs
        if self._stop:
            text = self._stream.push(*tokens) + self._stream.close()
        else:
            text = self._tokenizer.decode(tokens, skip_special_tokens=self._skips)
        return self.prefix + text, Delta(tokens, logprobs, delta.finished)


class Generation(ABC):
    """The outputs of one HTTP request. `close` must be called: it ends what is still computed."""

    object_name = ""
    chunk_name = ""
    id_prefix = ""

    def __init__(
        self, model: Model, choices: list[Choice], body: CompletionBody | ChatBody
    ) -> None:
        self.model = model
        self.choices = choices
        self._wants_usage = body.wants_usage
        self._gives_ids = bool(body.return_token_ids)
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}", "object": "", "created": int(time.time()),
            "model": body.model,
        }  # fmt: skip
        head = json.dumps({**self.head, "object": self.chunk_name}, ensure_ascii=False)
        self._chunk_head = head[:-1] + ', "choices": [{"index": '

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        made = await asyncio.gather(*(choice.whole() for choice in self.choices))
        choices = [
            self._choice(choice, text, delta)
            for choice, (text, delta) in zip(self.choices, made, strict=True)
        ]
        answer = {**self.head, "object": self.object_name, "choices": choices}
        return {**answer, "usage": self.usage(), **self._beside()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        async with aclosing(_merged(self.choices)) as news:
            async for choice, delta in news:
                piece = choice.push(delta)
                # also where the text is empty, as of half a character: it says that a token came
                yield self._chunk(choice, piece, delta)
        if self._wants_usage:
            yield event(
                {**self.head, "object": self.chunk_name, "choices": [], "usage": self.usage()}
            )
        yield DONE

    def close(self) -> None:
        for choice in self.choices:
            self.model.cancel(choice.job)

    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them."""
        jobs: dict[int, Job] = {}
        for choice in self.choices:  # the first of a prompt: the others find what it computed
            jobs.setdefault(id(choice.job.prompt), choice.job)
        prompt = sum(len(job.prompt) for job in jobs.values())
        cached = sum(job.num_reused for job in jobs.values())
        every = [choice.job for choice in self.choices]
        drafted, accepted = sum(j.num_drafted for j in every), sum(j.num_accepted for j in every)
        output = sum(choice.num_tokens for choice in self.choices)
        return usage(prompt, cached, output, drafted, accepted, self._num_thought_tokens())

    def _choice(self, choice: Choice, text: str, delta: Delta) -> dict[str, Any]:
        return {"index": choice.index, **self._content(choice, text), **self._rest(choice, delta)}

    def _chunk(self, choice: Choice, piece: str, delta: Delta) -> bytes:
        # the head is the same for all of a stream, and made once
        ends = delta.finished is not None
        rest = {**self._piece(choice, piece, ends=ends), **self._rest(choice, delta)}
        tail = json.dumps(rest, ensure_ascii=False)[1:] + "]"
        beside = self._beside()
        tail += f", {json.dumps(beside)[1:]}" if beside else "}"
        return f"data: {self._chunk_head}{choice.index}, {tail}\n\n".encode()

    def _num_thought_tokens(self) -> int | None:
        """Of all choices so far; None: the model does not think."""
        return None

    def _beside(self) -> dict[str, Any]:
        """What the answer, or the first chunk of a stream, has beside its choices."""
        return {}

    def _rest(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """What a choice has beside its text."""
        rest = {"logprobs": self._score(choice, delta.logprobs), "finish_reason": delta.finished}
        return {**rest, "token_ids": delta.tokens} if self._gives_ids else rest

    @abstractmethod
    def _content(self, choice: Choice, text: str) -> dict[str, Any]:
        """The field of a whole choice that has its text."""

    @abstractmethod
    def _piece(self, choice: Choice, piece: str, *, ends: bool) -> dict[str, Any]:
        """The field of a chunk that has its text; ends: it is the last one."""

    @abstractmethod
    def _score(self, choice: Choice, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        """The log-probabilities, where asked for."""


class Completion(Generation):
    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: Model, choices: list[Choice], body: CompletionBody) -> None:
        super().__init__(model, choices, body)
        self._scores = body.logprobs is not None
        skips = body.skip_special_tokens is not False
        self._logprobs = {choice: CompletionLogprobs(model.tokenizer, skips) for choice in choices}
        self._begun: set[Choice] = set()

    def _rest(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        rest = super()._rest(choice, delta)
        if self._gives_ids and choice not in self._begun:
            self._begun.add(choice)
            rest["prompt_token_ids"] = choice.job.prompt
        return rest

    def _content(self, choice: Choice, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, choice: Choice, piece: str, *, ends: bool) -> dict[str, Any]:
        return {"text": piece}

    def _score(self, choice: Choice, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._scores:
            return None
        prompt, choice.job.prompt_logprobs = choice.job.prompt_logprobs, None
        if prompt is None:
            return self._logprobs[choice].take(logprobs)
        first = TokenLogprobs(choice.job.prompt[0], 0.0, {})
        return self._logprobs[choice].take([first, *prompt, *logprobs], first_is_bare=True)


class Chat(Generation):
    object_name, chunk_name = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(
        self, model: Model, choices: list[Choice], body: ChatBody, thoughts: list[Thoughts],
        calls: list[ToolCalls],
    ) -> None:  # fmt: skip
        """thoughts, calls: of each choice; empty: the model does not think, there are no tools."""
        super().__init__(model, choices, body)
        self._thoughts, self._calls = thoughts, calls
        self._called = [0] * len(choices)
        """Calls that were given of each choice"""
        self._scores = bool(body.logprobs)
        self._begun: set[Choice] = set()
        self._owes_prompt = self._gives_ids

    def _num_thought_tokens(self) -> int | None:
        if not self._thoughts:
            return None
        return sum(
            num_thought_tokens(self.model.tokenizer, choice.job.output, opened=thoughts.opened)
            for choice, thoughts in zip(self.choices, self._thoughts, strict=True)
        )

    def _beside(self) -> dict[str, Any]:
        owes, self._owes_prompt = self._owes_prompt, False
        return {"prompt_token_ids": self.choices[0].job.prompt} if owes else {}

    def _content(self, choice: Choice, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._thoughts:
            thoughts, text = self._parted(choice, text, ends=True)
            message["content"] = text
            message["reasoning_content"] = thoughts or None
        if self._calls:
            said, calls = self._with_calls(choice, text, ends=True)
            message["content"] = said or None if calls else said
            message |= {"tool_calls": calls} if calls else {}
        return {"message": message}

    def news(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """What comes of it, as a chunk has it: content, reasoning_content, tool_calls."""
        ends = delta.finished is not None
        said: dict[str, Any] = self._piece(choice, choice.push(delta), ends=ends)["delta"]
        return said

    def _piece(self, choice: Choice, piece: str, *, ends: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {} if choice in self._begun else {"role": "assistant"}
        self._begun.add(choice)
        if self._thoughts:
            thoughts, piece = self._parted(choice, piece, ends=ends)
            delta |= {"reasoning_content": thoughts} if thoughts else {}
        if self._calls:
            first = self._called[choice.index]
            piece, calls = self._with_calls(choice, piece, ends=ends)
            if calls:
                numbered = [{"index": first + i, **call} for i, call in enumerate(calls)]
                delta |= {"tool_calls": numbered}
        return {"delta": {**delta, "content": piece}}

    def _with_calls(
        self, choice: Choice, text: str, *, ends: bool
    ) -> tuple[str, list[dict[str, Any]]]:
        """What is said and what is to be called in a piece of text."""
        parser = self._calls[choice.index]
        parts = [parser.push(text), *([parser.close()] if ends else [])]
        calls = [self._tool_call(call) for _, made in parts for call in made]
        self._called[choice.index] += len(calls)
        return "".join(said for said, _ in parts), calls

    def _tool_call(self, call: Call) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": new_id(self.model.tool_style), "type": "function", "function": function}

    def _rest(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        rest = super()._rest(choice, delta)
        if delta.finished == "stop" and self._called[choice.index]:
            rest["finish_reason"] = "tool_calls"
        return rest

    def _parted(self, choice: Choice, text: str, *, ends: bool) -> tuple[str, str]:
        """Thoughts and answer in a piece of text."""
        thoughts = self._thoughts[choice.index]
        parts = [thoughts.push(text), *([thoughts.close()] if ends else [])]
        return "".join(part[0] for part in parts), "".join(part[1] for part in parts)

    def _score(self, choice: Choice, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(self.model.tokenizer, logprobs) if self._scores else None


async def start_completion(model: Model, body: CompletionBody) -> Generation:
    """Raises InputError, ApiError, Overloaded or Unavailable."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of other than n is not supported. Leave it out.", param="best_of")
    if len(body.prompts) * (body.n or 1) > 128:
        raise ApiError(
            400,
            f"{len(body.prompts)} prompts times n={body.n or 1} are more than 128. Ask for fewer at once.",
            param="n",
        )
    is_prompt_alone = body.max_tokens == 0
    if is_prompt_alone and not body.echo:
        raise ApiError(
            400,
            "max_tokens=0 asks for nothing but the prompt. Add echo, and logprobs for its "
            "log-probabilities; or use -1 for as many tokens as fit.",
            param="max_tokens",
        )
    if is_prompt_alone and body.min_tokens:
        raise ApiError(
            400, "min_tokens does not go with max_tokens=0. Leave it out.", param="min_tokens"
        )
    grammar = await asyncio.to_thread(body.grammar)
    prompts = [await encode(model, given) for given in body.prompts]
    asked = []
    for prompt in prompts:
        # without a seed each output draws for itself, those of equal prompts too
        scored = body.logprobs if body.echo else None
        count = _count(model, prompt, body.max_tokens)
        params = body.sampling(count, model.stop_token_ids, body.logprobs, scored)
        asked.append((prompt, replace(params, grammar=grammar)))
    prefixes = [
        (
            ""
            if not body.echo
            else given
            if isinstance(given, str)
            else model.tokenizer.decode(given)
        )
        for given in body.prompts
    ]
    jobs = model.submit_all(asked)
    outputs = [(job, prefix) for some, prefix in zip(jobs, prefixes, strict=True) for job in some]
    choices = [
        Choice(
            i, job, model, prefix=prefix, is_prompt_alone=is_prompt_alone,
            includes_stop=bool(body.include_stop_str_in_output),
        )
        for i, (job, prefix) in enumerate(outputs)
    ]  # fmt: skip
    return Completion(model, choices, body)


async def start_chat(model: Model, body: ChatBody) -> Chat:
    """Raises InputError, ApiError, Overloaded or Unavailable."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    if asked == 0:
        name = "max_completion_tokens" if newer else "max_tokens"
        raise ApiError(
            400, f"{name}=0 asks for no answer. Use 1 or more, or -1 for all that fit.", param=name
        )
    followed = await asyncio.to_thread(_chat_grammar, model, body)
    prompt, opened = await _chat_prompt(model, body)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling(_count(model, prompt, asked), model.stop_token_ids, logprobs)
    params = replace(params, grammar=followed)
    tools, style = body.offered, model.tool_style
    if tools and style.mark in style.special:  # by which calls are known
        params = replace(params, skip_special_tokens=False)
    includes_stop = bool(body.include_stop_str_in_output)
    choices = [
        Choice(i, job, model, includes_stop=includes_stop)
        for i, job in enumerate(model.submit(prompt, params))
    ]
    # what follows a form has no thoughts; where only calls have one, the words before them may
    free = followed is None or body.may_say_anything
    thoughts = [Thoughts(opened=opened and free) for _ in choices] if model.thinks else []
    names = [tool.function.name for tool in tools]
    most = 1 if body.parallel_tool_calls is False or style.alone else None
    calls = [ToolCalls(style, names, most) for _ in choices] if tools else []
    return Chat(model, choices, body, thoughts, calls)


def _chat_grammar(model: Model, body: ChatBody) -> str | None:
    """What the answer must follow; None: nothing. Raises ApiError."""
    tools = body.offered
    if not tools:
        return body.grammar()
    if model.tool_style.name == "unread":
        raise ApiError(
            400,
            f"{model.label} writes its calls in a form that is not read here (<function=…>). Leave "
            "tools out, or use tool_choice 'none'.",
            param="tools",
        )
    schema = body.answer_schema()
    if body.may_say_anything and not any(tool.function.strict for tool in tools):
        return None
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    try:
        return grammar(
            model.tool_style, tools, forced=body.must_call, several=several, otherwise=schema
        )
    except InputError as error:
        raise ApiError(400, f"tools: {error}", param="tools") from None


async def _chat_prompt(model: Model, body: ChatBody) -> tuple[list[int], bool]:
    """Tokens of the conversation, and whether they end within the model's thinking."""
    if not model.tokenizer.has_template:
        raise ApiError(400, f"{model.label} has no chat template. Use /v1/completions.")

    def encode() -> tuple[list[int], bool]:
        text = conversation_text(model.tokenizer, body, model.tool_style)
        # the template writes the BOS token itself
        return model.tokenizer.encode(text, special=False), text.rstrip().endswith(OPEN)

    # a template is a program of the model's, which may take its time
    return await asyncio.to_thread(encode)


async def encode(model: Model, given: str | list[int]) -> list[int]:
    """Token ids of a text; ids are as they are."""
    if not isinstance(given, str):
        return given
    if len(given) <= _LONG_TEXT:
        return model.tokenizer.encode(given)
    return await asyncio.to_thread(model.tokenizer.encode, given)


def _count(model: Model, prompt: list[int], asked: int | None) -> int:
    """How many tokens to compute behind a prompt: as asked; None or -1: all that fit; 0: one, since logits
    come with a token. Raises InputError, ApiError, Unavailable."""
    limits = model.check_ready().limits
    if asked == 0:
        if len(prompt) >= limits.room:
            raise ApiError(
                400,
                f"A prompt that is scored has {limits.room - 1} tokens at most; yours has {len(prompt)}. "
                "Shorten it.",
                code="context_length_exceeded",
            )
        asked = 1
    if asked is None or asked == -1:
        _check_length(limits, prompt, 1)
        return limits.room - len(prompt)
    _check_length(limits, prompt, asked)
    return asked


def _check_length(limits: Limits, prompt: list[int], max_tokens: int) -> None:
    if not prompt:
        raise InputError("the prompt is empty. Give at least one token.")
    if len(prompt) > limits.max_input_len and len(prompt) + max_tokens <= limits.room:
        raise ApiError(
            400,
            f"This server takes prompts of {limits.max_input_len} tokens at most. However, yours has "
            f"{len(prompt)} tokens. Shorten it.",
            code="context_length_exceeded",
        )
    if len(prompt) + max_tokens > limits.room:
        raise ApiError(
            400,
            f"This model's maximum context length is {limits.room} tokens. However, you requested "
            f"{len(prompt) + max_tokens} tokens ({len(prompt)} in the prompt, {max_tokens} in the "
            "completion). Shorten one of them.",
            code="context_length_exceeded",
        )


async def _merged(choices: list[Choice]) -> AsyncGenerator[tuple[Choice, Delta], None]:
    """What comes for any of them, in the order that it comes."""
    if len(choices) == 1:
        async for delta in choices[0].deltas():
            yield choices[0], delta
        return
    news: asyncio.Queue[tuple[Choice, Delta | BaseException | None]] = asyncio.Queue()

    async def watch(choice: Choice) -> None:
        try:
            async for delta in choice.deltas():
                news.put_nowait((choice, delta))
            news.put_nowait((choice, None))
        except Exception as error:
            news.put_nowait((choice, error))

    tasks = [asyncio.create_task(watch(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            choice, what = await news.get()
            if isinstance(what, BaseException):
                raise what
            if what is None:
                left -= 1
            else:
                yield choice, what
    finally:
        for task in tasks:
            task.cancel()
