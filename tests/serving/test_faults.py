"""What goes wrong: clients that leave, engines that crash, servers that are told to stop."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.conftest import ENGINE, write_model

from tinier.engine import Engine, SamplingParams
from tinier.errors import InputError
from tinier.families import open_model
from tinier.serving import ServeConfig, Service, Source
from tinier.serving.worker import Add, Failed, Progress, serve

LONG = {"model": "one", "prompt": "x", "max_tokens": 250, "ignore_eos": True, "temperature": 0}


def outputs(service: Service) -> dict[str, float]:
    """Outputs of model `one` that ended, by how."""
    counted = {"cancelled": 0.0, "length": 0.0}
    for line in httpx.get(f"{service.url}/metrics").text.splitlines():
        for result in counted:
            if line.startswith(f'tinier_requests_total{{model="one@1",result="{result}"}}'):
                counted[result] = float(line.split()[-1])
    return counted


def running(service: Service) -> float:
    text = httpx.get(f"{service.url}/metrics").text
    found = re.search(r'tinier_requests_running\{model="one@1"\} ([\d.]+)', text)
    return float(found[1]) if found else 0.0


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(service: Service, stream: bool) -> None:
    body = LONG | {"stream": stream, "n": 4}
    before = outputs(service)
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        if stream:
            with client.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
                raise httpx.ReadTimeout("enough")
        client.post(f"{service.url}/v1/completions", json=body, timeout=0.1)
    wait_for(lambda: outputs(service)["cancelled"] == before["cancelled"] + 4)
    assert outputs(service)["length"] == before["length"]
    wait_for(lambda: running(service) == 0)  # with no other request to make a step
    text = httpx.post(f"{service.url}/v1/completions", json=LONG | {"max_tokens": 3}).json()
    assert text["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_requests_and_comes_back(
    model_folders: dict[str, Path],
) -> None:
    with Service([f"one={model_folders['one']}"], ENGINE, ServeConfig(port=0)) as service:
        (worker,) = (p for p in multiprocessing.active_children() if p.name not in _names_before)
        answers = []
        url = f"{service.url}/v1/completions"
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=LONG | {"n": 8}, timeout=60))
        )
        asking.start()
        wait_for(lambda: running(service) > 0)
        os.kill(worker.pid, signal.SIGKILL)
        asking.join()
        assert answers[0].status_code == 500
        assert answers[0].json()["error"]["code"] == "engine_failure"
        chat = {"model": "one", "messages": [{"role": "user", "content": "x"}]}
        again = httpx.post(f"{service.url}/v1/chat/completions", json=chat)
        assert (again.status_code, again.headers["retry-after"]) == (503, "1")
        assert running(service) == 0
        wait_for(lambda: httpx.get(f"{service.url}/health/ready").status_code == 200, 60)
        assert httpx.post(url, json=LONG, timeout=60).status_code == 200
        assert "tinier_engine_restarts_total" in httpx.get(f"{service.url}/metrics").text


_names_before: set[str] = set()


@pytest.fixture(autouse=True)
def _remember_children(service: Service) -> None:
    _names_before.clear()
    _names_before.update(p.name for p in multiprocessing.active_children())


def test_a_poisoned_request_fails_alone(model_folders: dict[str, Path]) -> None:
    engine = Engine(open_model(str(model_folders["one"])), ENGINE)
    params = SamplingParams(max_tokens=20)
    prompts = [[1, 2, 3], [66, 66], [4, 5], [7, 8, 9]]
    alone = [engine.generate([prompt], params)[0] for prompt in prompts]
    original, poison = engine.runner.run, [66, 66]

    def fail(chunks: list) -> object:  # type: ignore[type-arg]
        if any(c.request.prompt == poison and len(c.request.output) > 4 for c in chunks):
            raise RuntimeError("poison")
        return original(chunks)

    engine.runner.run = fail  # type: ignore[method-assign, assignment]
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, engine))
    thread.start()
    ours.recv()
    for i, prompt in enumerate(prompts):
        ours.send(Add([i], prompt, params))
    outputs: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    failed, finished = [], set()
    while len(finished) + len(failed) < len(prompts):
        message = ours.recv()
        if isinstance(message, Failed):
            failed.append(message.id)
            continue
        assert isinstance(message, Progress)
        for update in message.updates:
            outputs[update.id] += update.tokens
            if update.finished:
                finished.add(update.id)
    ours.send(None)
    thread.join()
    assert failed == [1]
    for i in (0, 2, 3):
        assert outputs[i] == alone[i]
    assert outputs[1] == alone[1][: len(outputs[1])]


@pytest.mark.slow
def test_keys(model_folders: dict[str, Path]) -> None:
    config = ServeConfig(port=0, api_keys=("first", "second"))
    with Service([f"one={model_folders['one']}"], ENGINE, config) as service:
        url = f"{service.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer second"}).status_code == 200
        assert httpx.get(f"{service.url}/metrics").status_code == 200  # scrapers have no key
        assert httpx.get(f"{service.url}/health").status_code == 200
        for body in ({"model": "one", "prompt": "x"}, {}):
            for path in ("v1/completions", "tokenize", "detokenize"):
                assert httpx.post(f"{service.url}/{path}", json=body).status_code == 401
        assert httpx.get(f"{service.url}/version").status_code == 401
        assert httpx.get(f"{service.url}/ping").status_code == 200


@pytest.mark.slow
def test_versions_are_loaded_and_unloaded_while_running(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a", 0), write_model(tmp_path / "b", 1)
    config = ServeConfig(port=0, load_folder=tmp_path, memory_bytes=2 << 30)
    ask = {"prompt": "x", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with Service([f"m={first}"], ENGINE, config) as service:

        def text(model: str) -> str:
            answer = httpx.post(f"{service.url}/v1/completions", json=ask | {"model": model})
            return str(answer.json()["choices"][0]["text"])

        def change(what: str, model: str) -> int:
            url = f"{service.url}/v1/models/{what}"
            return httpx.post(url, json={"model": model}, timeout=60).status_code

        one = text("m")
        assert change("load", "m=b") == 200
        assert [m["id"] for m in httpx.get(f"{service.url}/v1/models").json()["data"]] == [
            "m@1",
            "m",
        ]
        assert text("m") == text("m@2") != one
        assert text("m@1") == one
        assert change("load", "m@2=b") == 400
        assert change("load", "m=../secret") == 404
        assert change("load", f"m={second}/../../../etc") == 404
        assert change("unload", "m@2") == 200
        assert change("unload", "m@2") == 404
        assert text("m") == one


def test_a_budget_that_is_too_small(model_folders: dict[str, Path]) -> None:
    config = ServeConfig(port=0, memory_bytes=1 << 20)
    with pytest.raises(InputError, match="GiB of cache; 0.00 GiB of 0.00 GiB are free"):
        Service([f"one={model_folders['one']}"], ENGINE, config).start()


def test_the_same_version_twice(model_folders: dict[str, Path]) -> None:
    one = model_folders["one"]
    with pytest.raises(InputError, match="m@2 is there twice"):
        Service([f"m@2={one}", f"m@2={one}"], ENGINE, ServeConfig(port=0)).start()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a@x=m", "'x' is no version"), ("=m", "'' is no name"), ("a=", "names no model")],
)
def test_sources_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Source.parse(text)


@pytest.mark.slow
def test_sigterm_lets_requests_finish(model_folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "tinier", "serve", f"one={model_folders['one']}", "--port", "0",
               "--max-seq-len", "2000", "--device", "cpu"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        body = LONG | {"max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            refused = httpx.post(f"{url}/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert httpx.get(f"{url}/health/ready").json()["status"] == "draining"
            assert httpx.get(f"{url}/health/live").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        assert process.wait(20) == 0


# --- bodies that nobody would send

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
)
_FIELDS = [
    "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "logprobs",
    "top_logprobs", "logit_bias", "seed", "echo", "top_k", "min_p", "min_tokens", "stop_token_ids",
    "repetition_penalty", "stream_options", "best_of", "timeout", "response_format", "suffix",
    "skip_special_tokens", "include_stop_str_in_output", "return_token_ids", "add_generation_prompt",
    "continue_final_message", "chat_template_kwargs", "tokens", "return_token_strs", "add_special_tokens",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
]  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["v1/completions", "v1/chat/completions", "tokenize", "detokenize"]),
    body=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6),
    plain=st.booleans(),
)
def test_fuzzed_bodies_never_break_the_server(
    service: Service, path: str, body: dict[str, object], plain: bool
) -> None:
    if plain:  # so that the other fields are looked at
        body |= {"model": "one", "prompt": "x"}
        if path.startswith("v1"):
            body |= {"max_tokens": 2}
        if path == "detokenize":
            body |= {"tokens": [1, 2]}
        if path.endswith(("chat/completions", "detokenize")):
            body.pop("prompt")
        if path.endswith("chat/completions"):
            body |= {"messages": [{"role": "user", "content": "x"}]}
    answer = httpx.post(
        f"{service.url}/{path}",
        content=json.dumps(body).encode("utf-8", "surrogatepass"),
        timeout=20,
    )
    assert answer.status_code < 500 or answer.status_code == 504, answer.text
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text


def test_a_worker_whose_server_has_gone_while_it_loaded_ends_in_silence(
    model_folders: dict[str, Path],
) -> None:
    here, there = multiprocessing.Pipe()
    engine = Engine(open_model(str(model_folders["one"])), ENGINE)
    here.close()
    serve(there, engine)
