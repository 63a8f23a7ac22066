"""The process that runs one model's engine, and the messages between it and the server.

The engine has a process of its own, so that HTTP never takes the interpreter from it, a crash of it is not
the server's, and its memory is free when it ends. Start at `run`. Messages go through a pipe: `Add` and
`Cancel` down, one `Progress` a step up.
"""

import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from tinier.engine import Engine, EngineConfig, Limits, Request, SamplingParams, TokenLogprobs
from tinier.errors import TinierError
from tinier.families import open_model

log = logging.getLogger(__name__)

_JOIN_SECONDS = {"cpu": 0.003, "cuda": 0.0}
"""How long others may come before an idle engine begins: short beside a step on a CPU, not on a GPU"""


class Add(NamedTuple):
    ids: list[int]
    """One for each of the `n` outputs"""
    prompt: list[int]
    params: SamplingParams


class Cancel(NamedTuple):
    id: int


class Ready(NamedTuple):
    """The engine is loaded."""

    limits: Limits
    num_blocks: int
    cache_bytes: int
    weight_bytes: int
    notes: list[str]
    """How the linear layers are multiplied; what the device has no fast path for is marked"""


class Update(NamedTuple):
    """News of one output."""

    id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finished: str | None
    num_reused: int
    num_drafted: int
    num_accepted: int
    """Tokens that a draft proposed so far, and those of them that were right"""
    prompt_logprobs: list[TokenLogprobs] | None
    """With its first tokens, where asked for"""
    pooled: list[float] | None
    """The same"""


class Progress(NamedTuple):
    """What one step did, and how the engine stands after it."""

    updates: list[Update]
    running: int
    waiting: int
    free_blocks: int
    preemptions: int


class Failed(NamedTuple):
    """One output, or with no id the engine itself, came to an error."""

    id: int | None
    message: str


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker loads."""

    folder: Path
    config: EngineConfig
    threads: int | None = None
    """Of torch, where several share a CPU; None: as torch chooses"""
    log_level: int = logging.WARNING

    def engine(self) -> Engine:
        from tinier.tokenizer import load_tokenizer

        checkpoint = open_model(str(self.folder))
        return Engine(checkpoint, self.config, tokenizer=load_tokenizer(checkpoint))


def run(connection: Connection, spec: WorkerSpec) -> None:
    """Entry of the process."""
    # the server decides when this ends: Ctrl-C reaches both
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=spec.log_level, format=f"%(levelname)s worker {os.getpid()}: %(message)s"
    )
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    try:
        engine = spec.engine()
    except TinierError as error:
        with suppress(OSError):  # the server is gone
            connection.send(Failed(None, str(error)))
        return
    engine.warm_up()
    serve(connection, engine)


def serve(connection: Connection, engine: Engine) -> None:
    """Compute what comes through the pipe until its other end is closed."""
    paths = engine.runner.paths.items()
    notes = [path if fast else f"{path} (no fast path on this device)" for path, fast in paths]
    with suppress(EOFError, OSError):  # the server is gone
        connection.send(
            Ready(engine.limits, engine.num_blocks, engine.cache_bytes, engine.weight_bytes, notes)
        )
        _Worker(connection, engine).run()


class _Worker:
    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        self._engine = engine
        self._ids: dict[Request, int] = {}
        self._requests: dict[int, Request] = {}
        self._sent: dict[int, int] = {}
        """Tokens of each output that the server has"""

    def run(self) -> None:
        while self._receive():
            self._step()

    def _receive(self) -> bool:
        """Take all messages that are there; wait for one if there is nothing to compute.

        Who asks together is computed together: after a pause others may join for a moment.
        """
        end = 0.0
        while True:
            idle = not self._engine.has_work
            if not self._connection.poll(None if idle else max(0.0, end - time.monotonic())):
                return True
            message = self._connection.recv()
            if message is None:
                return False
            if isinstance(message, Add):
                self._add(message)
            else:
                self._cancel(message.id)
            if idle:
                end = time.monotonic() + _JOIN_SECONDS[self._engine.decoder.device.type]

    def _add(self, message: Add) -> None:
        try:
            requests = self._engine.add_all(message.prompt, message.params)
        except TinierError as error:
            for id_ in message.ids:
                self._connection.send(Failed(id_, str(error)))
            return
        for id_, request in zip(message.ids, requests, strict=True):
            self._ids[request], self._requests[id_], self._sent[id_] = id_, request, 0

    def _cancel(self, id_: int) -> None:
        request = self._requests.get(id_)
        if request is not None:
            self._engine.cancel(request)
            self._forget(request)
            self._report([])  # how the engine stands now: there may be no next step

    def _forget(self, request: Request) -> None:
        id_ = self._ids.pop(request)
        del self._requests[id_], self._sent[id_]

    def _step(self) -> None:
        try:
            changed = self._engine.step()
        except Exception as error:
            self._recover(error)
            return
        self._report(changed)

    def _report(self, changed: list[Request]) -> None:
        engine = self._engine
        for request in changed:
            if request.finished == "error" and request in self._ids:
                self._fail_without_numbers(request)
        updates = [self._update(request) for request in changed if request in self._ids]
        self._connection.send(
            Progress(
                updates, engine.num_running, engine.num_waiting, engine.num_free_blocks,
                engine.num_preemptions,
            )
        )  # fmt: skip

    def _fail_without_numbers(self, request: Request) -> None:
        tokens, adapter = request.prompt + request.output, request.params.adapter
        where = self._engine.overflow(tokens, adapter)
        log.error("request %d fails: %s", self._ids[request], where)
        self._connection.send(
            Failed(self._ids[request], "the model's logits are no numbers (NaN or Inf)")
        )
        self._forget(request)

    def _update(self, request: Request) -> Update:
        id_ = self._ids[request]
        sent = self._sent[id_]
        self._sent[id_] = max(sent, len(request.output))
        update = Update(
            id_, request.output[sent:], request.logprobs[sent:], request.finished, request.num_reused,
            request.num_drafted, request.num_accepted,
            # none at all of a prompt of one token, which nothing predicts
            request.prompt_logprobs
            if sent == 0 and request.params.prompt_logprobs is not None
            else None,
            request.pooled.tolist() if sent == 0 and request.pooled is not None else None,
        )  # fmt: skip
        if request.finished is not None:
            self._forget(request)
        return update

    def _recover(self, error: Exception) -> None:
        """An exception in a step is one request's fault, but it took the engine's state along.

        So every request is computed again, alone: the guilty one fails by itself, the others go on where
        the client left them. Errors of the device cannot be survived: the process ends, and the server
        starts another.
        """
        log.error("the engine failed; its requests are computed again, one by one", exc_info=error)
        if isinstance(error, torch.AcceleratorError) or self._engine.config.tensor_parallel > 1:
            raise error  # the processes that share the model are not where this one is
        self._engine.reset()
        for request, id_ in list(self._ids.items()):
            del self._ids[request]
            again = self._engine.add(request.prompt, request.params)
            self._ids[again], self._requests[id_] = id_, again
            while id_ in self._requests:
                try:
                    changed = self._engine.step()
                except torch.AcceleratorError:
                    raise
                except Exception:
                    log.exception("request %d fails alone too", id_)
                    self._connection.send(Failed(id_, "the engine failed on this request"))
                    self._forget(again)
                    self._engine.reset()
                else:
                    # the client has the first tokens already
                    self._report(
                        [r for r in changed if r.finished or len(r.output) > self._sent[id_]]
                    )
