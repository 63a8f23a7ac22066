"""The model that Triton's Python backend runs: it hands requests to the tinier server over a Unix socket.

It is copied into the model repository and runs in Triton's own Python, so it imports nothing of tinier.
Names of inputs and outputs are those of the TensorRT-LLM backend. One file serves all kinds: of `tinier
serve --triton`, `NAME` answers once and `NAME_stream` (decoupled) piece by piece; a repository of `tinier
export --to triton` has one that is asked with `stream`, and starts the server itself.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

# where its numpy is
sys.path.append(os.environ.get("TINIER_PACKAGES", "/nowhere"))
import numpy as np
import triton_python_backend_utils as pb_utils

# input -> field of the completion body, and its type
FIELDS = {
    "max_tokens": ("max_tokens", int),
    "min_length": ("min_tokens", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "random_seed": ("seed", int),
    "ignore_eos": ("ignore_eos", bool),
}


# Triton's own, and what clients send to say which of the two answers they read
PARAMETERS = {"priority", "timeout", "triton_enable_empty_final_response", "stream", "id"}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: x["string_value"] for name, x in config["parameters"].items()}
        self._decoupled = config["model_transaction_policy"]["decoupled"]
        self._answers = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = None
        if "tinier_serve" in parameters:  # of an exported repository
            folder = os.path.join(args["model_repository"], args["model_version"], "weights")
            self._server = _Server(folder, parameters["tinier_serve"])
            self._socket, self._key, self._label = self._server.socket, "", "model"
        else:
            self._socket, self._key = os.environ["TINIER_SOCKET"], os.environ["TINIER_SOCKET_KEY"]
            self._label = f"{parameters['tinier_model']}@{args['model_version']}"
            self._tell("attach")

    def finalize(self):
        if self._server is None:
            self._tell("detach")
        else:
            self._server.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def execute(self, requests):
        """Start the requests and return: they join what the engine computes already, and answer
        through their senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:  # the inputs are gone when this returns
                bodies, streams = self._bodies(request), self._streams(request)
            except Exception as error:
                failed = pb_utils.TritonError(f"{error}", pb_utils.TritonError.INVALID_ARG)
                sender.send(pb_utils.InferenceResponse(error=failed), flags=FINAL)
            else:
                answer = self._answer(bodies, streams, request, sender)
                self._loop.call_soon_threadsafe(self._begin, answer)

    def _begin(self, answer):
        # a task that nothing holds may be collected while it waits
        task = self._loop.create_task(answer)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    def _tell(self, what):
        work = self._post(f"/internal/{what}", {"model": self._label})
        status, text = asyncio.run_coroutine_threadsafe(work, self._loop).result()
        if status != 200:
            raise pb_utils.TritonModelException(f"tinier cannot {what} {self._label}: {text}")

    async def _answer(self, bodies, streams, request, sender):
        try:
            if streams:
                await self._stream(bodies, sender, request)
            else:
                sender.send(await self._whole(bodies, request), flags=FINAL)
        except _Refused as error:
            sender.send(pb_utils.InferenceResponse(error=error.as_triton()), flags=FINAL)
        except Exception as error:
            failed = pb_utils.TritonError(f"tinier: {type(error).__name__}")
            sender.send(pb_utils.InferenceResponse(error=failed), flags=FINAL)

    def _streams(self, request):
        if self._server is None:
            return self._decoupled
        asked = _rows(request, "stream")
        return asked is not None and bool(asked.flat[0])

    def _bodies(self, request):
        """A completion body for each row of text_input [rows, 1]."""
        texts = _rows(request, "text_input")
        if texts is None:
            raise ValueError("text_input is missing")
        # of the generate extension: fields that are no input of the model come as parameters
        unknown = sorted(set(json.loads(request.parameters() or "{}")) - PARAMETERS)
        if unknown:
            known = ", ".join(("text_input", *FIELDS, "stop_words", "return_log_probs"))
            raise ValueError(f"{', '.join(unknown)} is not known. Known: {known}")
        given = {name: _rows(request, name) for name in (*FIELDS, "stop_words", "return_log_probs")}
        given = {name: rows for name, rows in given.items() if rows is not None}
        return [
            self._body(text[0].decode(), {name: rows[i] for name, rows in given.items()})
            for i, text in enumerate(texts)
        ]

    def _body(self, text, given):
        """given: one row of each input that is there."""
        body = {"model": self._label, "prompt": text, "stream": True, "max_tokens": 16}
        for name, (field, kind) in FIELDS.items():
            if name in given:
                body[field] = kind(given[name][0])
        if "seed" in body:
            body["seed"] %= 2**63  # Triton's has a bit more
        # as the TensorRT-LLM backend: greedy unless sampling is asked for
        if (
            not any(body.get(name) for name in ("temperature", "top_p", "seed"))
            and body.get("top_k", 0) < 2
        ):
            body["temperature"] = 0.0
        if "stop_words" in given:
            body["stop"] = [stop.decode() for stop in given["stop_words"] if stop]
        if "return_log_probs" in given and given["return_log_probs"][0]:
            body["logprobs"] = 0
        return body

    async def _whole(self, bodies, request):
        async def one(body):
            text, scores, reason = "", [], ""
            async with contextlib.aclosing(self._choices(body, request)) as choices:
                async for choice in choices:
                    text += choice["text"]
                    scores += (choice["logprobs"] or {}).get("token_logprobs", [])
                    reason = choice["finish_reason"] or reason
            return text, scores, reason

        return _response(await asyncio.gather(*(one(body) for body in bodies)))

    async def _stream(self, bodies, sender, request):
        if len(bodies) > 1:
            raise _Refused(400, "a stream takes one text_input")
        async with contextlib.aclosing(self._choices(bodies[0], request)) as choices:
            async for choice in choices:
                scores = (choice["logprobs"] or {}).get("token_logprobs", [])
                sender.send(_response([(choice["text"], scores, choice["finish_reason"] or "")]))
        sender.send(flags=FINAL)

    async def _choices(self, body, request):
        """Of a streamed completion, until it ends or Triton's client is gone."""
        reader, writer = await self._open("/v1/completions", body)
        try:
            status = int((await reader.readline()).split()[1])
            if status != 200:
                raise _Refused(status, await _rest(reader))
            while line := await reader.readline():
                if request.is_cancelled():
                    raise _Refused(499, "cancelled")
                if line.startswith(b"data: {"):
                    data = json.loads(line[6:])
                    if "error" in data:
                        raise _Refused(500, data["error"]["message"])
                    yield data["choices"][0]
                if line.startswith(b"data: [DONE]"):
                    return
            raise _Refused(503, "the server was stopped before the end")
        finally:
            writer.close()  # if it is not at its end, the engine drops it

    async def _post(self, path, body):
        reader, writer = await self._open(path, body)
        status = int((await reader.readline()).split()[1])
        text = await _rest(reader)
        writer.close()
        return status, text

    async def _open(self, path, body):
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=1 << 24)
        raw = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: tinier\r\nConnection: close\r\n"
            f"Authorization: Bearer {self._key}\r\n"
            f"Content-Length: {len(raw)}\r\n\r\n".encode()
            + raw
        )
        return reader, writer


class _Server:
    """`tinier serve` on one model, until `stop`, or until this process ends."""

    def __init__(self, weights, options):
        self._folder = tempfile.mkdtemp(prefix="tinier-triton-")
        self.socket = os.path.join(self._folder, "socket")
        # the Python that tinier is installed in; what Triton set up for its own is not for it
        python = os.environ.get("TINIER_PYTHON", "python3")
        kept = {
            name: x
            for name, x in os.environ.items()
            if not name.startswith("PYTHON") and name != "TINIER_API_KEY"
        }
        command = [python, "-m", "tinier", "serve", f"model={weights}", "--uds", self.socket]
        self._process = subprocess.Popen(
            [*command, *shlex.split(options)], env=kept, preexec_fn=_end_with_parent
        )
        while not self._is_ready():
            if self._process.poll() is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise pb_utils.TritonModelException("tinier serve did not start: see the log above")
            time.sleep(0.2)

    def _is_ready(self):
        with socket.socket(socket.AF_UNIX) as asking, contextlib.suppress(OSError):
            asking.settimeout(1)
            asking.connect(self.socket)
            asking.sendall(
                b"GET /health/ready HTTP/1.1\r\nHost: tinier\r\nConnection: close\r\n\r\n"
            )
            return asking.recv(16).split()[1:2] == [b"200"]
        return False

    def stop(self):
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _end_with_parent():
    """The server hears SIGTERM when Triton's process dies (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class _Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status

    def as_triton(self):
        codes = {
            400: pb_utils.TritonError.INVALID_ARG, 404: pb_utils.TritonError.NOT_FOUND,
            429: pb_utils.TritonError.UNAVAILABLE, 503: pb_utils.TritonError.UNAVAILABLE,
            499: pb_utils.TritonError.CANCELLED,
        }  # fmt: skip
        return pb_utils.TritonError(
            str(self), codes.get(self.status, pb_utils.TritonError.INTERNAL)
        )


async def _rest(reader):
    """The message of an error's body, after its headers."""
    raw = await reader.read()
    text = raw.partition(b"\r\n\r\n")[2].decode()
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError):
        return text


def _rows(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _response(rows):
    """text_output, finish_reason and cum_log_probs [rows, 1], output_log_probs [rows, tokens]."""
    longest = max(len(scores) for _, scores, _ in rows)
    log_probs = np.zeros((len(rows), longest), dtype=np.float32)
    for i, (_, scores, _) in enumerate(rows):
        log_probs[i, : len(scores)] = scores
    texts = np.array([[text.encode()] for text, _, _ in rows], dtype=np.object_)
    reasons = np.array([[reason.encode()] for _, _, reason in rows], dtype=np.object_)
    return pb_utils.InferenceResponse([
        pb_utils.Tensor("text_output", texts),
        pb_utils.Tensor("finish_reason", reasons),
        pb_utils.Tensor("cum_log_probs", log_probs.sum(axis=1, keepdims=True)),
        pb_utils.Tensor("output_log_probs", log_probs),
    ])  # fmt: skip
