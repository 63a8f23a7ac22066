"""What stands around the answers: connections, headers, origins, addresses, and what errors say."""

import gzip
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.conftest import ENGINE

from tinier.benchmark.load import base_url, served_models
from tinier.engine.request import Limits
from tinier.errors import InputError
from tinier.serving import ServeConfig, Service, connections, query
from tinier.serving.config import address
from tinier.serving.generation import _check_length
from tinier.serving.protocol import ApiError

ASK: dict[str, Any] = {"model": "one", "prompt": "x", "max_tokens": 4, "temperature": 0}


def post(service: Service, body: Any, path: str = "completions", **more: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/{path}", json=body, timeout=30, **more)


@pytest.fixture
def wire(service: Service) -> Iterator[socket.socket]:
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def answer_of(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


# --- connections and heads -------------------------------------------------------------------------


def test_endless_headers_are_cut_off(wire: socket.socket) -> None:
    wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    sent = 0
    try:
        while sent < 64 << 20:
            wire.sendall(b"x-a: " + b"b" * 60_000 + b"\r\n")
            sent += 60_000
    except OSError:
        pass
    assert sent < 8 << 20  # what the system's buffers take, and no more


def test_one_endless_header_line_is_cut_off(wire: socket.socket) -> None:
    wire.sendall(b"GET / HTTP/1.1\r\nx-a: ")
    with pytest.raises(OSError):  # noqa: PT011
        for _ in range(1000):
            wire.sendall(b"b" * 65536)


@pytest.mark.parametrize("headers", [b"x-a: " + b"b" * 70_000 + b"\r\n", b"x: y\r\n" * 200])
def test_large_heads_get_431(wire: socket.socket, headers: bytes) -> None:
    wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
    answer = answer_of(wire)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"


def test_a_head_that_does_not_come_ends_the_connection(
    wire: socket.socket, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert answer_of(slow).startswith(b"HTTP/1.1 408 ")


def test_what_is_no_http_gets_an_error_and_the_server_lives(
    wire: socket.socket, service: Service
) -> None:
    wire.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
    assert answer_of(wire).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{service.url}/health").status_code == 200


def test_too_many_connections_get_503(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    host, port = service.url.removeprefix("http://").split(":")
    opened = [socket.create_connection((host, int(port)), timeout=20) for _ in range(4)]
    try:
        time.sleep(0.1)
        opened[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_of(opened[-1]).startswith(b"HTTP/1.1 503 ")
    finally:
        for one in opened:
            one.close()


def test_a_connection_serves_several_requests(service: Service) -> None:
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{service.url}/health").status_code == 200
            assert client.post(f"{service.url}/v1/completions", json=ASK).status_code == 200


def test_bodies_in_flight_have_a_limit_together(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinier.serving.app._MOST_BODY_BYTES", 0)  # then it is max_body_bytes
    host, port = service.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    opened = [socket.create_connection((host, int(port)), timeout=20) for _ in range(2)]
    try:
        opened[0].sendall(head + b" " * 3_900_000)
        time.sleep(0.3)
        opened[1].sendall(head + b" " * 1_000_000)
        assert opened[1].recv(100).startswith(b"HTTP/1.1 429 ")
    finally:
        for one in opened:
            one.close()
    assert post(service, ASK).status_code == 200  # what was held is free again


def test_a_compressed_body_is_415(service: Service) -> None:
    answer = httpx.post(
        f"{service.url}/v1/completions", content=gzip.compress(json.dumps(ASK).encode()),
        headers={"content-encoding": "gzip"},
    )  # fmt: skip
    assert answer.status_code == 415
    assert "gzip" in answer.json()["error"]["message"]


# --- where a request comes from --------------------------------------------------------------------


def test_another_page_s_posts_are_refused(service: Service) -> None:
    for path in ("completions", "models/unload", "models/load"):
        answer = post(service, ASK, path, headers={"origin": "https://evil.example"})
        assert answer.status_code == 403
        assert "--cors" in answer.json()["error"]["message"]
    own = post(service, ASK, headers={"origin": service.url})
    assert own.status_code == 200


def test_a_name_that_was_pointed_here_is_refused(service: Service) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        answer = httpx.get(f"{service.url}/v1/models", headers={"host": host})
        assert answer.status_code == 403
    for host in ("localhost", "localhost:1", "[::1]:8000", "127.0.0.1"):
        assert httpx.get(f"{service.url}/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.slow
def test_pages_that_are_allowed_may_ask_without_a_key_for_that(
    model_folders: dict[str, Path],
) -> None:
    page = "https://app.example"
    config = ServeConfig(port=0, api_keys=("k",), cors_origins=(page,))
    with Service([f"one={model_folders['one']}"], ENGINE, config) as service:
        url = f"{service.url}/v1/completions"
        asks = {
            "origin": page, "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }  # fmt: skip
        before = httpx.options(url, headers=asks)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == page
        sent = {"origin": page, "authorization": "Bearer k"}
        answer = httpx.post(url, json=ASK, headers=sent)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        other = httpx.options(url, headers=asks | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        # with a key any name will do: a proxy's
        named = {"host": "models.example", "authorization": "Bearer k"}
        assert httpx.get(f"{service.url}/v1/models", headers=named).status_code == 200
        assert httpx.get(f"{service.url}/metrics").status_code == 200


def test_origins_that_are_none() -> None:
    with pytest.raises(InputError, match="no page's origin"):
        ServeConfig(cors_origins=("app.example/page",))


def test_a_prompt_longer_than_the_server_takes_is_told_its_own_limit() -> None:
    limits = Limits(vocab=264, max_input_len=4, room=100)
    with pytest.raises(ApiError, match="takes prompts of 4 tokens at most. However, yours has 5"):
        _check_length(limits, [1] * 5, 8)
    with pytest.raises(ApiError, match="maximum context length is 100 tokens. .* requested 104"):
        _check_length(limits, [1] * 4, 100)


def test_times_that_are_no_numbers() -> None:
    for name in ("timeout", "drain_seconds", "keep_alive"):
        with pytest.raises(InputError, match=f"{name}=nan. Use"):
            ServeConfig(**{name: math.nan})


# --- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1//models", "/v1/models"])
def test_slashes_too_many(service: Service, path: str) -> None:
    assert len(httpx.get(service.url + path).json()["data"]) == 2


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_clients_find_the_server_however_it_is_typed(service: Service, end: str) -> None:
    assert served_models(base_url(service.url + end), None) == ["one", "two"]
    assert len(query(service.url + end, "x", max_tokens=2)) == 1


def test_ipv6_addresses_have_brackets() -> None:
    assert address("::1", 8111) == "http://[::1]:8111"
    assert address("127.0.0.1", 80) == "http://127.0.0.1:80"


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(
    service: Service, model_folders: dict[str, Path]
) -> None:
    port = int(service.url.rsplit(":", 1)[1])
    with pytest.raises(InputError, match="Address already in use"):
        Service([f"one={model_folders['one']}"], ENGINE, ServeConfig(port=port)).start()


def test_a_unix_socket_in_place_of_a_port(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    path, model = tmp_path / "socket", f"one={model_folders['one']}"
    with Service([model], ENGINE, ServeConfig(uds=path)):
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            body = {"model": "one", "prompt": "x", "max_tokens": 2}
            assert client.post("http://tinier/v1/completions", json=body).status_code == 200
        with pytest.raises(InputError, match=r"socket: Address already in use\. Use another --uds"):
            Service([model], ENGINE, ServeConfig(uds=path)).start()
    assert not path.exists()
    with pytest.raises(InputError, match="Leave --uds out"):
        ServeConfig(uds=path, triton=True)


@pytest.mark.slow
def test_of_two_servers_started_together_on_one_port_one_says_so(
    model_folders: dict[str, Path],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tinier", "serve", f"one={model_folders['one']}", "--port",
               str(port), "--max-seq-len", "200", "--device", "cpu"]  # fmt: skip
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    end = time.monotonic() + 60
    while all(one.poll() is None for one in both):
        assert time.monotonic() < end
        time.sleep(0.1)
    loser = next(one for one in both if one.poll() is not None)
    winner = both[1 - both.index(loser)]
    errors = loser.communicate()[1]
    assert loser.returncode == 2
    assert "Address already in use" in errors
    assert "Traceback" not in errors
    assert winner.stdout is not None
    assert "serving one" in winner.stdout.readline()
    winner.terminate()
    winner.communicate()
    assert winner.returncode == 0


# --- the end of the time to drain ------------------------------------------------------------------


def _held_open(url: str) -> socket.socket:
    """A request whose body never comes."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    )
    return connection


@pytest.mark.slow
def test_when_the_time_to_drain_is_over_everyone_hears_of_it(
    model_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    slow = {**ASK, "max_tokens": 250, "ignore_eos": True, "n": 8}
    config = ServeConfig(port=0, drain_seconds=0.1, max_queue=100)
    service = Service([f"one={model_folders['one']}"], ENGINE, config)
    service.start()
    answers: dict[str, Any] = {}

    def whole() -> None:
        answers["whole"] = post(service, slow)

    def streamed() -> None:
        body = slow | {"stream": True}
        with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=30) as got:
            answers["stream"] = [line for line in got.iter_lines() if line]

    waiting = _held_open(service.url)
    threads = [threading.Thread(target=work) for work in (whole, whole, streamed, streamed)]
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    service.stop()
    for thread in threads:
        thread.join()
    assert answers["whole"].status_code == 503
    assert answers["whole"].json()["error"]["code"] == "unavailable"
    assert "shutting down" in json.loads(answers["stream"][-1][6:])["error"]["message"]
    assert answer_of(waiting).startswith(b"HTTP/1.1 503 ")
    waiting.close()
    assert "Traceback" not in caplog.text


# --- what errors say -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stop": ["a", ""]},
            "Invalid value for 'stop.1': String should have at least 1 character",
        ),
        ({"stop": ["a"] * 129}, "Invalid value for 'stop': List should have at most 128 items"),
        ({"prompt": ["a"] * 129}, "Invalid value for 'prompt': List should have at most 128 items"),
        ({"prompt": [1, -1]}, "Invalid value for 'prompt.1'"),
        ({"top-p": 0.9}, "Unrecognized request argument supplied: top-p. Did you mean 'top_p'?"),
        (
            {"temperature": 3},
            "Invalid value for 'temperature': Input should be less than or equal to 2",
        ),
        ({"top_k": "many"}, "Invalid value for 'top_k'"),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(
    service: Service, change: dict[str, Any], message: str
) -> None:
    answer = post(service, ASK | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"3"])
def test_a_body_that_is_no_object(service: Service, body: bytes) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The body must be a JSON object."


def test_a_missing_field_is_named(service: Service) -> None:
    answer = post(service, {"model": "one", "messages": [{"role": "user"}]}, "chat/completions")
    assert answer.json()["error"]["message"] == "Missing required parameter: 'messages.0.content'."


# --- tokens are their bytes ------------------------------------------------------------------------


def test_parts_of_characters_have_their_bytes_and_offsets_fit_the_text(service: Service) -> None:
    prompt = "😀😃😄😁é"
    body = {**ASK, "prompt": prompt, "max_tokens": 6, "logprobs": 5, "echo": True}
    choice = post(service, body).json()["choices"][0]
    scores = choice["logprobs"]
    count = len(prompt.encode())
    assert scores["tokens"][0] == "bytes:\\xf0"
    assert scores["text_offset"][: count + 1] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4, 4, 5]
    assert all(len(top) == 5 for top in scores["top_logprobs"][1:])
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        if not token.startswith("bytes:") and token not in ("<bos>", "<eos>"):
            assert choice["text"][offset:].startswith(token)


def test_chat_scores_have_the_tokens_own_bytes(service: Service) -> None:
    body = {
        "model": "one", "messages": [{"role": "user", "content": "😀"}], "max_tokens": 8,
        "logprobs": True, "top_logprobs": 20, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    choice = post(service, body, "chat/completions").json()["choices"][0]
    entries = choice["logprobs"]["content"]
    raw = b"".join(bytes(e["bytes"]) for e in entries if not e["token"].startswith("<"))
    assert raw.decode(errors="replace") == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 20 for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_of_one_token_has_its_entry(service: Service, stream: bool) -> None:
    body = {**ASK, "prompt": [65], "logprobs": 0, "echo": True, "stream": stream, "max_tokens": 3}
    if stream:
        with httpx.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
            events = [json.loads(x[6:]) for x in answer.iter_lines() if x.startswith("data: {")]
        scores: list[Any] = []
        for event in events:
            scores += event["choices"][0]["logprobs"]["token_logprobs"]
    else:
        scores = post(service, body).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == 4
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])


def test_equal_prompts_draw_apart_without_a_seed_and_alike_with_one(service: Service) -> None:
    body = {**ASK, "prompt": ["x"] * 4, "temperature": 1, "max_tokens": 16, "ignore_eos": True}

    def texts(**more: Any) -> set[str]:
        return {choice["text"] for choice in post(service, body | more).json()["choices"]}

    assert len(texts()) == 4
    assert len(texts(seed=1)) == 1


def test_minimum_and_special_tokens_hold_for_stop_strings(service: Service) -> None:
    """As in vLLM: a stop string within the first min_tokens does not count, and one that is a special
    token ends the text there."""
    asked = ASK | {"max_tokens": 30, "ignore_eos": True}
    plain = post(service, asked).json()["choices"][0]["text"]
    stop = next(letter for letter in plain if letter.isascii() and letter.isprintable())
    early = post(service, asked | {"stop": stop}).json()
    late = post(service, asked | {"stop": stop, "min_tokens": 15}).json()
    assert early["choices"][0]["text"] == plain[: plain.index(stop)]
    assert late["usage"]["completion_tokens"] >= 15
    biased = {"logit_bias": {"257": 100}, "stop": "<eos>"}
    ended = post(service, asked | biased).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_model_that_gives_no_numbers_is_an_error_and_not_an_answer(
    tmp_path: Path, path: str, write_overflowing: Callable[[Path], Path]
) -> None:
    folder = write_overflowing(tmp_path / "m")
    with Service([f"one={folder}"], ENGINE, ServeConfig(port=0)) as service:
        body = {"model": "one", "max_tokens": 4, "temperature": 0}
        body |= {"prompt": "x"} if path == "completions" else {
            "messages": [{"role": "user", "content": "x"}]
        }  # fmt: skip
        answer = post(service, body, path)
        assert answer.status_code == 500
        assert "no numbers" in answer.json()["error"]["message"]
