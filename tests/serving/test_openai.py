"""The HTTP API as the `openai` package sees it; its text is the engine's."""

import concurrent.futures
import inspect
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serving.conftest import ENGINE

import tinier
from tinier.cli.serve import serve
from tinier.engine import Engine, SamplingParams
from tinier.errors import InputError
from tinier.families import open_model
from tinier.serving import MAX_BATCH_SIZE, Service, query
from tinier.tokenizer import load_tokenizer

PROMPT = "Ten green bottles hanging"


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def engine_text(folder: Path, ids: list[int], count: int) -> tuple[str, list[int]]:
    checkpoint = open_model(str(folder))
    (output,) = Engine(checkpoint, ENGINE).generate([ids], SamplingParams(max_tokens=count))
    return load_tokenizer(checkpoint).decode(output, skip_special_tokens=True), output


def test_a_greedy_completion_is_the_engine_s(
    client: openai.OpenAI, model_folders: dict[str, Path]
) -> None:
    ids = list(PROMPT.encode())
    for name, folder in model_folders.items():
        text, output = engine_text(folder, ids, 24)
        made = client.completions.create(
            model=name, prompt=ids, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
        assert made.choices[0].text == text
        assert made.choices[0].finish_reason == "length"
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), len(output))


def test_a_stream_is_the_same_text_in_pieces_and_ends_with_the_usage(client: openai.OpenAI) -> None:
    asked = {"model": "one", "prompt": PROMPT, "max_tokens": 30, "temperature": 0.8, "seed": 5}
    whole = client.completions.create(**asked)
    pieces = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].text for p in pieces[:-1]) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].choices == []
    assert pieces[-1].usage is not None
    assert whole.usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({p.id for p in pieces}) == 1


def test_chat_goes_through_the_template(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    made = client.chat.completions.create(
        model="one",
        messages=messages,
        max_completion_tokens=12,
        temperature=0,
    )
    text = "<system>Be brief.<user>Hello<assistant>"
    plain = client.completions.create(model="one", prompt=text, max_tokens=12, temperature=0)
    assert made.choices[0].message.content == plain.choices[0].text
    assert made.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model="one",
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
    )
    chunks: list[Any] = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == plain.choices[0].text


def asked(service: Service, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{service.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def told(service: Service, path: str, **body: Any) -> str:
    """What a refusal says."""
    answer = httpx.post(f"{service.url}{path}", json=body)
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def test_an_answer_goes_on_with_its_own_beginning(service: Service) -> None:
    greedy = {"model": "one", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    question, begun = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}
    chat = asked(service, "/v1/chat/completions", **greedy, messages=[question, begun],
                 continue_final_message=True)  # fmt: skip
    plain = asked(service, "/v1/completions", **greedy, prompt="<user>Hi<assistant>Well, I")
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert "Leave one of them out" in told(
        service, "/v1/chat/completions", **greedy, messages=[question, begun], **both
    )
    assert "the last message is the user's" in told(
        service, "/v1/chat/completions", **greedy, messages=[question], continue_final_message=True
    )


def test_a_template_s_variables(service: Service) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    def text(**more: Any) -> str:
        made = asked(service, "/tokenize", model="one", messages=messages, **more)
        return str(asked(service, "/detokenize", model="one", tokens=made["tokens"])["prompt"])

    assert text() == "<user>Hi<assistant>"
    assert text(add_generation_prompt=False) == "<user>Hi"
    assert text(chat_template_kwargs={"thinks": True}) == "<user>Hi<assistant><think>"
    for name in ("chat_template", "tokenize", "add_generation_prompt"):
        refused = told(service, "/v1/chat/completions", model="one", messages=messages,
                       chat_template_kwargs={name: "x"})  # fmt: skip
        assert f"'{name}' cannot be set as a variable of the chat template" in refused


def test_text_to_ids_and_back(service: Service, model_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(open_model(str(model_folders["one"])))
    made = asked(service, "/tokenize", model="one", prompt="Hi é", return_token_strs=True)
    assert made["tokens"] == tokenizer.encode("Hi é")
    assert (made["count"], made["max_model_len"]) == (len(made["tokens"]), 256)
    assert len(made["token_strs"]) == made["count"]
    assert asked(service, "/detokenize", model="one", tokens=made["tokens"]) == {"prompt": "Hi é"}
    assert "this server has one, two" in told(service, "/tokenize", prompt="Hi")
    assert "either prompt or messages" in told(service, "/tokenize", model="one")
    assert (
        told(service, "/detokenize", model="one", tokens=[999]) == "tokens has 999. Use 0 to 263."
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "tools go with messages" in told(
        service, "/tokenize", model="one", prompt="x", tools=tools
    )
    assert asked(service, "/tokenize", model="one", prompt="x", tools=None, chat_template=None)
    assert httpx.get(f"{service.url}/version").json() == {"version": tinier.__version__}
    assert httpx.get(f"{service.url}/ping").status_code == 200


def test_as_many_tokens_as_fit(service: Service) -> None:
    room = asked(service, "/tokenize", model="one", prompt="x")["max_model_len"]
    endless = {"temperature": 0, "ignore_eos": True, "model": "one"}
    prompt, messages = "x" * (room - 20), [{"role": "user", "content": "x" * (room - 40)}]
    for most in (-1, None):
        made = asked(service, "/v1/completions", **endless, prompt=prompt, max_tokens=most)
        assert made["usage"]["total_tokens"] == room
        for name in ("max_tokens", "max_completion_tokens"):
            made = asked(
                service, "/v1/chat/completions", **endless, messages=messages, **{name: most}
            )
            assert made["usage"]["total_tokens"] == room
    made = asked(service, "/v1/completions", **endless, prompt="x")
    assert made["usage"]["completion_tokens"] == 16  # OpenAI's, where nothing is said
    for name in ("max_tokens", "max_completion_tokens"):
        assert f"{name}=0 asks for no answer" in told(
            service, "/v1/chat/completions", **endless, messages=messages, **{name: 0}
        )
    made = asked(service, "/v1/chat/completions", **endless, messages=messages, max_tokens=0,
                 max_completion_tokens=5)  # fmt: skip
    assert made["usage"]["completion_tokens"] == 5
    # what asks for nothing passes, also where it is a chat's
    assert asked(service, "/v1/completions", **endless, prompt="x", add_generation_prompt=True,
                 continue_final_message=None, chat_template_kwargs={})  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone_is_scored(service: Service, stream: bool) -> None:
    scored = {"model": "one", "prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0}
    whole = asked(service, "/v1/completions", **scored, max_tokens=3)
    if stream:
        answer = httpx.post(f"{service.url}/v1/completions",
                            json={**scored, "max_tokens": 0, "stream": True,
                                  "stream_options": {"include_usage": True}})  # fmt: skip
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if "{" in line]
        *pieces, last = events
        choice = pieces[0]["choices"][0]
        choice |= {"text": "".join(piece["choices"][0]["text"] for piece in pieces),
                   "finish_reason": pieces[-1]["choices"][0]["finish_reason"]}  # fmt: skip
        usage = last["usage"]
    else:
        made = asked(service, "/v1/completions", **scored, max_tokens=0)
        choice, usage = made["choices"][0], made["usage"]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert usage["completion_tokens"] == 0
    known = whole["choices"][0]["logprobs"]
    assert choice["logprobs"]["tokens"] == known["tokens"][: len(PROMPT)]
    assert choice["logprobs"]["token_logprobs"] == known["token_logprobs"][: len(PROMPT)]
    assert "asks for nothing but the prompt" in told(
        service, "/v1/completions", model="one", prompt="x", max_tokens=0
    )
    assert "is scored has 255 tokens at most; yours has 256" in told(
        service, "/v1/completions", model="one", prompt=[7] * 256, max_tokens=0, echo=True
    )
    assert "does not go with max_tokens=0" in told(
        service, "/v1/completions", model="one", prompt="x", max_tokens=0, echo=True, min_tokens=2
    )


def test_ids_of_tokens_are_given_where_asked_for(service: Service) -> None:
    greedy = {"model": "one", "max_tokens": 6, "temperature": 0, "ignore_eos": True,
              "return_token_ids": True}  # fmt: skip
    made = asked(service, "/v1/completions", **greedy, prompt=PROMPT)["choices"][0]
    assert (
        made["prompt_token_ids"]
        == asked(service, "/tokenize", model="one", prompt=PROMPT)["tokens"]
    )
    assert len(made["token_ids"]) == 6
    messages = [{"role": "user", "content": "Hi"}]
    chat = asked(service, "/v1/chat/completions", **greedy, messages=messages)
    assert (
        chat["prompt_token_ids"]
        == asked(service, "/tokenize", model="one", messages=messages)["tokens"]
    )
    for path, body in (
        ("completions", {"prompt": PROMPT}),
        ("chat/completions", {"messages": messages}),
    ):
        answer = httpx.post(f"{service.url}/v1/{path}", json={**greedy, **body, "stream": True})
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if "{" in line]
        ids = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
        with_prompt = [
            i for i, chunk in enumerate(chunks) if "prompt_token_ids" in json.dumps(chunk)
        ]
        assert with_prompt == [0]
        assert ids == (made if path == "completions" else chat["choices"][0])["token_ids"]


def test_special_tokens_and_stop_strings_are_shown_where_asked_for(
    service: Service, model_folders: dict[str, Path]
) -> None:
    greedy = {
        "model": "one",
        "prompt": PROMPT,
        "max_tokens": 30,
        "temperature": 0,
        "ignore_eos": True,
    }
    special = load_tokenizer(open_model(str(model_folders["one"]))).special_ids
    name, token = next(iter(special.items()))
    pushed = {**greedy, "logit_bias": {str(token): 100}, "max_tokens": 2}
    for shown, text in ((False, name * 2), (True, "")):
        made = asked(service, "/v1/completions", **pushed, skip_special_tokens=shown)
        assert made["choices"][0]["text"] == text
    # a stop string that has one ends the work, too, and offsets count what is shown
    made = asked(service, "/v1/completions", **pushed | {"max_tokens": 50}, logprobs=0,
                 skip_special_tokens=False, stop=name * 3, include_stop_str_in_output=True)  # fmt: skip
    assert made["choices"][0]["text"] == name * 3
    assert made["choices"][0]["finish_reason"] == "stop"
    assert made["usage"]["completion_tokens"] == 3
    assert made["choices"][0]["logprobs"]["text_offset"] == [i * len(name) for i in range(3)]
    text = asked(service, "/v1/completions", **greedy)["choices"][0]["text"]
    stop = text[5:8]
    before = text[: text.index(stop)]
    for included, ends in ((False, before), (True, before + stop)):
        made = asked(
            service, "/v1/completions", **greedy, stop=stop, include_stop_str_in_output=included
        )
        assert made["choices"][0]["text"] == ends


def test_several_prompts_and_outputs(client: openai.OpenAI) -> None:
    prompts = ["One", "Two", "Three"]
    made = client.completions.create(
        model="one", prompt=prompts, n=2, max_tokens=6, temperature=1, seed=3
    )
    assert [c.index for c in made.choices] == list(range(6))
    alone = [
        client.completions.create(model="one", prompt=p, max_tokens=6, temperature=1, seed=3 + i)
        for p in prompts
        for i in range(2)
    ]
    assert [c.text for c in made.choices] == [a.choices[0].text for a in alone]
    streamed = ["" for _ in range(6)]
    for chunk in client.completions.create(
        model="one", prompt=prompts, n=2, max_tokens=6, temperature=1, seed=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in made.choices]


def test_stop_strings_end_the_text_in_streams_too(client: openai.OpenAI) -> None:
    asked = {"model": "one", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[6:9]
    for stream in (False, True):
        made = client.completions.create(**asked, stop=[stop, "never"], stream=stream)
        parts = list(made) if stream else [made]
        assert "".join(p.choices[0].text for p in parts) == text[: text.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="one", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    assert made.choices[0].text.startswith(PROMPT)
    scores = made.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.token_logprobs[0] is None
    assert len(scores.tokens) == len(scores.token_logprobs) == len(PROMPT) + 5
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    streamed = client.completions.create(
        model="one", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3, echo=True, stream=True
    )
    parts = [chunk.choices[0] for chunk in streamed]
    assert "".join(part.text for part in parts) == made.choices[0].text
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part.logprobs, name)]
        assert joined == getattr(scores, name)
    chat = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "x"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert len(content.content) == 4
    for entry in content.content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 2


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["one", "two"]
    assert client.models.retrieve("two@1").id == "two"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "none", "prompt": "x"}, 404, "does not exist"),
        ({"model": "one"}, 400, "Missing required parameter: 'prompt'"),
        ({"model": "one", "prompt": "x", "colour": 1}, 400, "Unrecognized request argument"),
        ({"model": "one", "prompt": "x", "temperature": 3}, 400, "'temperature'"),
        ({"model": "one", "prompt": "x", "max_tokens": 10_000}, 400, "maximum context length"),
        ({"model": "one", "prompt": [9999]}, 400, "outside"),
        ({"model": "one", "prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"model": "one", "prompt": "x", "min_tokens": 20}, 400, "min_tokens"),
        ({"model": "one", "prompt": []}, 400, "'prompt'"),
        ({"model": "one", "prompt": ""}, 400, "empty"),
        ({"model": "one", "prompt": ["x"] * 128, "n": 2}, 400, "128"),
    ],
)
def test_bad_requests_get_openai_s_error(
    service: Service, body: dict[str, object], status: int, words: str
) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("raw", "status"), [(b"", 400), (b"{", 400), (b"[" * 100_000, 400), (b"x" * (5 << 20), 413)]
)
def test_bodies_that_are_no_json_or_too_large(service: Service, raw: bytes, status: int) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", content=raw)
    assert answer.status_code == status
    assert "error" in answer.json()


def test_unknown_urls_and_methods(service: Service) -> None:
    assert httpx.get(f"{service.url}/v1/nothing").status_code == 404
    answer = httpx.get(f"{service.url}/v1/completions")
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == "Not allowed to GET /v1/completions. Use POST."


def test_the_queue_has_an_end(service: Service) -> None:
    body = {"model": "one", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "n": 4}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda _: httpx.post(f"{service.url}/v1/completions", json=body, timeout=60),
                range(12),
            )
        )
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_deadlines(service: Service) -> None:
    body = {"model": "one", "prompt": "x", "max_tokens": 250, "timeout": 0.02, "ignore_eos": True}
    answer = httpx.post(f"{service.url}/v1/completions", json=body)
    assert answer.status_code == 504
    answer = httpx.post(f"{service.url}/v1/completions", json=body | {"stream": True})
    assert '"code": "timeout"' in answer.text
    assert "[DONE]" not in answer.text


def test_health_metrics_and_page(service: Service) -> None:
    assert httpx.get(f"{service.url}/health/live").json() == {"status": "live"}
    ready = httpx.get(f"{service.url}/health").json()
    assert ready == {"status": "ready", "models": {"one@1": "ready", "two@1": "ready"}}
    metrics = httpx.get(f"{service.url}/metrics").text
    assert 'tinier_time_to_first_token_seconds_count{model="one@1"}' in metrics
    assert 'tinier_requests_total{model="one@1",result="length"}' in metrics
    assert "side by side" in httpx.get(service.url).text


def test_events_are_json_objects(service: Service) -> None:
    body = {"model": "one", "prompt": PROMPT, "max_tokens": 5, "stream": True, "logprobs": 1}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert json.loads(line.removeprefix("data: "))["object"] == "text_completion"


def test_query_from_python(service: Service, client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Then there were"]
    made = client.completions.create(model="two", prompt=prompts, max_tokens=9, temperature=0)
    assert query(service.url, prompts, model="two", max_tokens=9) == [c.text for c in made.choices]
    assert len(query(service.url, PROMPT, temperature=0.5, seed=1)) == 1
    with pytest.raises(InputError, match=r"answered 404.*nothing"):
        query(service.url, PROMPT, model="nothing")
    with pytest.raises(InputError, match="does not answer"):
        query("http://127.0.0.1:1", PROMPT)


def test_a_recipe_serves_with_the_batch_of_the_command_line() -> None:
    assert inspect.signature(serve).parameters["max_batch_size"].default == MAX_BATCH_SIZE
