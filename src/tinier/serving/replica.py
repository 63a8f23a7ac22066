"""One engine of a served model as the server sees it: its process, and the jobs that it was given.

Start at `Replica.start` and `Replica.submit`. Everything but the two threads that hold the ends of the pipe
runs on the event loop.
"""

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tinier.engine import SamplingParams, TokenLogprobs
from tinier.errors import TinierError
from tinier.serving.metrics import Metrics
from tinier.serving.worker import Add, Cancel, Failed, Progress, Ready, WorkerSpec, run

log = logging.getLogger(__name__)

# a worker that ends this often without having computed anything is not started again
_MOST_CRASHES = 3


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
    model: str
    """NAME@VERSION that was asked for"""
    prompt: list[int]
    params: SamplingParams
    """Its own: `n` is 1"""
    arrived: float
    """time.perf_counter"""
    attempts: int = 0
    """Engines that it was given to"""
    finished: str | None = None
    """`stop` or `length`"""
    output: list[int] = field(default_factory=list)
    num_reused: int = 0
    """Tokens of the prompt that were cached"""
    num_drafted: int = 0
    num_accepted: int = 0
    """Tokens that a draft proposed so far, and those of them that were right"""
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: list[float] | None = None
    """Hidden states of the prompt, where asked for"""
    first_token: float | None = None
    error: TinierError | None = None
    _num_sent: int = 0
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_tokens(self) -> int:
        return len(self.output)

    def fail(self, error: TinierError) -> None:
        """Tell whoever waits for it."""
        self.error = error
        self._news.set()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Tokens as they come; several at once where the reader is slower than the engine. The last one
        may be empty. Raises EngineFailure or Unavailable."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self.error is not None:
                raise self.error
            delta = Delta(self.output[self._num_sent :], self._logprobs, self.finished)
            self._num_sent, self._logprobs = len(self.output), []
            yield delta
            if delta.finished is not None:
                return


class Prefixes:
    """Beginnings of prompts that an engine has in its cache, as far as its requests tell: in whole blocks,
    the longest unused forgotten first."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self._block_size, self._num_blocks = block_size, num_blocks
        self._known: OrderedDict[int, None] = OrderedDict()

    def add(self, tokens: list[int], adapter: int = 0) -> None:
        for key in self._keys(tokens, adapter):
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._num_blocks:
            self._known.popitem(last=False)

    def length(self, tokens: list[int], adapter: int = 0) -> int:
        """How many of the first tokens are cached, as that adapter computes them."""
        count = 0
        for key in self._keys(tokens, adapter):
            if key not in self._known:
                break
            count += self._block_size
        return count

    def _keys(self, tokens: list[int], adapter: int) -> list[int]:
        """Of each whole block with all that is before it."""
        keys, key = [], adapter
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            key = hash((key, *tokens[end - self._block_size : end]))
            keys.append(key)
        return keys


class Replica:
    def __init__(
        self, model: str, number: int, spec: WorkerSpec, metrics: Metrics,
        stands: Callable[[], None], lost: Callable[["Replica", list[Job]], None],
    ) -> None:  # fmt: skip
        """model: NAME@VERSION, as which it is counted. number: among the model's replicas. stands: called
        when `standing` is new. lost: called with the jobs of an engine that ended, or cannot be used any
        more."""
        self.model = model
        self.label = f"{model}, replica {number}" if number else model
        self.spec = spec
        self.ready: Ready | None = None
        self.failure: str | None = None
        """Why it will not come back"""
        self.standing: Progress | None = None
        """After the last step"""
        self._metrics = metrics
        self._stands, self._lost = stands, lost
        self._jobs: dict[int, Job] = {}
        self._prefixes: Prefixes | None = None
        """Where there are several replicas to choose from"""
        self._chosen_from = number > 0
        self._closing = False
        self._crashes = 0
        self._settled = asyncio.Event()  # it is ready, or will never be

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

    def cached(self, prompt: list[int], adapter: int) -> int:
        """Tokens of the prompt that are in this engine's cache, as far as is known."""
        return self._prefixes.length(prompt, adapter) if self._prefixes else 0

    def submit(self, jobs: list[Job], prompt: list[int], params: SamplingParams) -> None:
        """Send a request to the engine, which is ready. jobs: one for each of its `n` outputs."""
        for job in jobs:
            job.attempts += 1
            self._jobs[job.id] = job
        if self._prefixes:
            self._prefixes.add(prompt, params.adapter)
        self._outbox.put(Add([job.id for job in jobs], prompt, params))

    def jobs_of(self, model: str) -> list[Job]:
        """Those that one model was asked for."""
        return [job for job in self._jobs.values() if job.model == model]

    def cancel(self, job: Job) -> bool:
        """End a job at once. False: it is not, or no longer, here."""
        if self._jobs.pop(job.id, None) is None:
            return False
        self._outbox.put(Cancel(job.id))
        return True

    async def close(self) -> None:
        """End the process; jobs that are left are lost."""
        self._closing = True
        self._outbox.put(None)
        await asyncio.to_thread(self._process.join, 10)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._lose_all()

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
            if self._chosen_from:
                self._prefixes = Prefixes(self.spec.config.block_size, message.num_blocks)
            log.info("%s is ready: %s", self.label, "; ".join(message.notes))
            self._settled.set()
        elif message.id is None:
            self.failure = message.message  # may name paths: not for clients
            log.error("%s: %s", self.label, message.message)
            self._settled.set()
        else:
            job = self._jobs.pop(message.id, None)
            if job is not None:
                job.fail(EngineFailure(message.message))
                self._metrics.failed(job.model)

    def _take_progress(self, progress: Progress) -> None:
        self._crashes = 0
        now = time.perf_counter()
        for update in progress.updates:
            job = self._jobs.get(update.id)
            if job is None:  # cancelled while this was on its way
                continue
            if job.first_token is None and update.tokens:
                job.first_token = now
                self._metrics.first_token(job.model, now - job.arrived)
            job.num_reused = update.num_reused
            job.num_drafted, job.num_accepted = update.num_drafted, update.num_accepted
            if update.prompt_logprobs is not None:
                job.prompt_logprobs = update.prompt_logprobs
            if update.pooled is not None:
                job.pooled = update.pooled
            job.finished = update.finished
            job.output += update.tokens
            job._logprobs += update.logprobs
            job._news.set()
            if update.finished:
                del self._jobs[update.id]
                if self._prefixes:
                    # the next turn of a conversation
                    self._prefixes.add(job.prompt + job.output, job.params.adapter)
                self._metrics.finished(job.model, job, now)
        self.standing = progress
        self._stands()

    def _ended(self) -> None:
        """The process is gone."""
        self.ready = self.standing = None
        self._stands()
        if self._closing or self.failure:
            self._lose_all()
            return
        self._crashes += 1
        if self._crashes >= _MOST_CRASHES:
            self.failure = f"the engine of {self.label} ended {self._crashes} times in a row"
            log.error(self.failure)
            self._lose_all()
            self._settled.set()
            return
        log.error("the engine of %s ended; it starts again", self.label)
        self._metrics.restarted(self.model)
        self._lose_all()
        self._spawn()

    def _lose_all(self) -> None:
        jobs, self._jobs = list(self._jobs.values()), {}
        self._lost(self, jobs)
