"""A served model as the server sees it: its worker process, and the jobs that it was given.

Start at `Model.start` and `Model.submit`. Everything but the two threads that hold the ends of the pipe
runs on the event loop.
"""

import asyncio
import itertools
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tinier.engine import SamplingParams, TokenLogprobs
from tinier.errors import TinierError
from tinier.serving.metrics import Metrics
from tinier.serving.worker import Add, Cancel, Failed, Progress, Ready, WorkerSpec, run
from tinier.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# a worker that ends this often without having computed anything is not started again
_MOST_CRASHES = 3


class Overloaded(TinierError):
    """The queue is full."""


class Unavailable(TinierError):
    """The model is not loaded, or its engine is down."""


class EngineFailure(TinierError):
    """The engine failed while it computed this request."""


class Delta(NamedTuple):
    """What has come since the last one."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finished: str | None
    """`stop` or `length` with the last one"""


@dataclass(eq=False)
class Job:
    """One output that is being computed."""

    id: int
    prompt: list[int]
    arrived: float
    """time.perf_counter"""
    finished: str | None = None
    """`stop` or `length`"""
    num_tokens: int = 0
    num_reused: int = 0
    """Tokens of the prompt that were cached"""
    prompt_logprobs: list[TokenLogprobs] | None = None
    first_token: float | None = None
    error: TinierError | None = None
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Tokens as they come; several at once where the reader is slower than the engine. The last one
        may be empty. Raises EngineFailure or Unavailable."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self.error is not None:
                raise self.error
            delta = Delta(self._tokens, self._logprobs, self.finished)
            self._tokens, self._logprobs = [], []
            yield delta
            if delta.finished is not None:
                return


class Model:
    """One version of a model, loaded."""

    def __init__(
        self, name: str, version: int, spec: WorkerSpec, tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...], max_queue: int, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.name = name
        self.version = version
        self.spec = spec
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.created = int(time.time())
        self.ready: Ready | None = None
        self.failure: str | None = None
        """Why it will not come back"""
        self._max_jobs = spec.config.max_batch_size + max_queue
        self._metrics = metrics
        self._jobs: dict[int, Job] = {}
        self._ids = itertools.count()
        self._closing = False
        self._crashes = 0
        self._settled = asyncio.Event()  # it is ready, or will never be

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises Unavailable if it cannot be."""
        self._loop = asyncio.get_running_loop()
        self._spawn()
        await self._settled.wait()
        if self.failure:
            raise Unavailable(self.failure)

    def submit(self, prompt: list[int], params: SamplingParams) -> list[Job]:
        """Send a request to the engine; a job for each of its `n` outputs.

        Raises InputError for one that can never be computed, Overloaded past the queue's end, Unavailable.
        """
        if self.ready is None or self._closing:
            raise Unavailable(f"{self.label} {'failed' if self.failure else 'is not ready'}")
        self.ready.limits.check(prompt, params)
        if self.num_jobs + params.n > self._max_jobs:
            raise Overloaded(f"{self.label} has {self.num_jobs} requests, and room for no more")
        now = time.perf_counter()
        jobs = [Job(next(self._ids), prompt, now) for _ in range(params.n)]
        self._jobs |= {job.id: job for job in jobs}
        self._outbox.put(Add([job.id for job in jobs], prompt, params))
        return jobs

    def cancel(self, job: Job) -> None:
        """End a job at once. One that is done stays as it is."""
        if self._jobs.pop(job.id, None) is not None:
            self._outbox.put(Cancel(job.id))
            self._metrics.cancelled(self.label)
            job.error = Unavailable("the request was cancelled")  # for whoever still waits for it
            job._news.set()

    async def close(self) -> None:
        """End the process; jobs that are left fail."""
        self._closing = True
        self._outbox.put(None)
        await asyncio.to_thread(self._process.join, 10)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._fail_all(Unavailable(f"{self.label} was unloaded"))

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(theirs, self.spec), daemon=True)
        self._process.start()
        theirs.close()
        # messages to a process that is gone are not for the next one
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for target in (self._read, self._write):
            threading.Thread(target=target, args=(ours, self._outbox), daemon=True).start()

    def _read(self, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._take, connection.recv())
        except (EOFError, OSError):
            outbox.put(None)
            self._loop.call_soon_threadsafe(self._ended)
        except RuntimeError:  # the event loop is closed
            return

    @staticmethod
    def _write(connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        try:
            while True:
                message = outbox.get()
                connection.send(message)
                if message is None:
                    return
        except OSError:
            return

    def _take(self, message: Ready | Progress | Failed) -> None:
        if isinstance(message, Progress):
            self._take_progress(message)
        elif isinstance(message, Ready):
            self.ready = message
            log.info("%s is ready: %s", self.label, "; ".join(message.notes))
            self._settled.set()
        elif message.id is None:
            self.failure = message.message  # may name paths: not for clients
            log.error("%s: %s", self.label, message.message)
            self._settled.set()
        else:
            job = self._jobs.pop(message.id, None)
            if job is not None:
                self._fail(job, EngineFailure(message.message))

    def _take_progress(self, progress: Progress) -> None:
        assert self.ready is not None
        self._crashes = 0
        now = time.perf_counter()
        for update in progress.updates:
            job = self._jobs.get(update.id)
            if job is None:  # cancelled while this was on its way
                continue
            if job.first_token is None and update.tokens:
                job.first_token = now
                self._metrics.first_token(self.label, now - job.arrived)
            job.num_tokens += len(update.tokens)
            job.num_reused = update.num_reused
            if update.prompt_logprobs is not None:
                job.prompt_logprobs = update.prompt_logprobs
            job.finished = update.finished
            job._tokens += update.tokens
            job._logprobs += update.logprobs
            job._news.set()
            if update.finished:
                del self._jobs[update.id]
                self._metrics.finished(self.label, job, now)
        self._metrics.stands(self.label, progress, self.ready.num_blocks)

    def _ended(self) -> None:
        """The process is gone."""
        self.ready = None
        self._metrics.ended(self.label)
        if self._closing or self.failure:
            self._fail_all(Unavailable(f"{self.label} is not loaded any more"))
            return
        self._crashes += 1
        self._fail_all(EngineFailure(f"the engine of {self.label} ended; it starts again"))
        if self._crashes >= _MOST_CRASHES:
            self.failure = f"the engine of {self.label} ended {self._crashes} times in a row"
            log.error(self.failure)
            self._settled.set()
            return
        log.error("the engine of %s ended; it starts again", self.label)
        self._metrics.restarted(self.label)
        self._spawn()

    def _fail(self, job: Job, error: TinierError) -> None:
        job.error = error
        job._news.set()
        self._metrics.failed(self.label)

    def _fail_all(self, error: TinierError) -> None:
        jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            self._fail(job, error)
