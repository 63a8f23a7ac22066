"""A served model as the server sees it: its engines, and the requests that it was given.

Start at `Engines.start` and `Model.submit`. A model has one engine or several replicas of it (replica.py),
each with a GPU or more of its own, and one queue in front of them; models that are adapters of one base
share them: a request goes where the cache has most
of its prompt, else to the fewest others. A replica that ends loses its own requests alone, and of those the
ones that have no token yet are sent to another.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from tinier.engine import SamplingParams
from tinier.errors import TinierError
from tinier.serving.metrics import Metrics
from tinier.serving.replica import Delta, EngineFailure, Job, Replica, Unavailable
from tinier.serving.thinking import thinks
from tinier.serving.tools import Style, style_of
from tinier.serving.worker import Ready, WorkerSpec
from tinier.tokenizer import Tokenizer

__all__ = ["Delta", "EngineFailure", "Engines", "Job", "Model", "Overloaded", "Unavailable"]

_MOST_ATTEMPTS = 2


class Overloaded(TinierError):
    """The queue is full."""


class Engines:
    """The replicas behind a model, or behind several with adapters of one base."""

    def __init__(
        self, label: str, specs: list[WorkerSpec], max_queue: int, metrics: Metrics
    ) -> None:
        """label: NAME@VERSION of the first model, for the log. specs: of each replica."""
        self.label = label
        self.created = time.time()
        self.ids = itertools.count()
        self.models: set[str] = set()
        """Labels of those that use them"""
        self._batch_size = specs[0].config.max_batch_size
        self.max_jobs = self._batch_size * len(specs) + max_queue
        self._metrics = metrics
        self._closing = False
        numbers = range(1, len(specs) + 1) if len(specs) > 1 else [0]
        self.replicas = [
            Replica(label, number, spec, metrics, self._stands, self._lost)
            for number, spec in zip(numbers, specs, strict=True)
        ]

    @property
    def ready(self) -> Ready | None:
        """What every engine that is up can take; None: none is."""
        up = [replica.ready for replica in self.replicas if replica.ready]
        return min(up, key=lambda ready: ready.limits.room, default=None)

    @property
    def failed(self) -> str | None:
        """Why they will not come back."""
        failures = [replica.failure for replica in self.replicas]
        return failures[0] if all(failures) else None

    @property
    def num_jobs(self) -> int:
        return sum(replica.num_jobs for replica in self.replicas)

    async def start(self) -> None:
        """Start the processes and wait until all are ready. Raises Unavailable if one cannot be."""
        await asyncio.gather(*(replica.start() for replica in self.replicas))

    async def close(self) -> None:
        """End the processes; jobs that are left fail."""
        self._closing = True
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    def choose(self, prompt: list[int], adapter: int) -> Replica:
        """Where a request goes. One must be ready."""
        ready = [replica for replica in self.replicas if replica.ready]
        fewest = min(replica.num_jobs for replica in ready)
        # a cached prompt saves time, but not as much as waiting behind half a batch costs
        near = [r for r in ready if r.num_jobs <= fewest + self._batch_size // 2]
        return max(near, key=lambda replica: (replica.cached(prompt, adapter), -replica.num_jobs))

    def _lost(self, replica: Replica, jobs: list[Job]) -> None:
        """The engine of a replica is gone, with these jobs."""
        for job in jobs:
            if (
                not self._closing
                and not job.output
                and job.attempts < _MOST_ATTEMPTS
                and self.ready
            ):
                replica = self.choose(job.prompt, job.params.adapter)
                replica.submit([job], job.prompt, job.params)
                continue
            if self._closing:
                job.fail(Unavailable(f"{job.model} was unloaded"))
            elif replica.failure:
                job.fail(Unavailable(f"{job.model} is not loaded any more"))
            else:
                job.fail(EngineFailure(f"the engine of {job.model} ended; it starts again"))
            self._metrics.failed(job.model)

    def _stands(self) -> None:
        """Note what all engines do now, for each model that uses them."""
        standing = [(r.standing, r.ready) for r in self.replicas if r.standing and r.ready]
        for label in self.models:
            self._metrics.stands(
                label,
                running=sum(progress.running for progress, _ in standing),
                waiting=sum(progress.waiting for progress, _ in standing),
                preemptions=sum(progress.preemptions for progress, _ in standing),
                free_blocks=sum(progress.free_blocks for progress, _ in standing),
                num_blocks=sum(ready.num_blocks for _, ready in standing),
            )


class Model:
    """One version of a model, loaded."""

    def __init__(
        self, name: str, version: int, engines: Engines, tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...], metrics: Metrics, adapter: int = 0,
    ) -> None:  # fmt: skip
        """adapter: of the engines', from 1; 0: none."""
        self.name = name
        self.version = version
        self.engines = engines
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.created = int(time.time())
        self._metrics = metrics
        self._adapter = adapter
        self._closing = False
        engines.models.add(self.label)

    @cached_property
    def thinks(self) -> bool:
        """Whether its answers may have thoughts before them."""
        return thinks(self.tokenizer)

    @cached_property
    def tool_style(self) -> Style:
        """How it calls tools."""
        return style_of(self.tokenizer)

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def ready(self) -> Ready | None:
        """What every engine that is up can take; None: none is."""
        return self.engines.ready

    @property
    def failure(self) -> str | None:
        """Why the model will not come back."""
        return self.engines.failed

    def check_ready(self) -> Ready:
        """What an engine that is up can take. Raises Unavailable where none is."""
        ready = self.ready
        if ready is None or self._closing:
            state = (
                "failed: see the server's log" if self.failure else "is not ready. Try again later"
            )
            raise Unavailable(f"{self.label} {state}.")
        return ready

    def submit(self, prompt: list[int], params: SamplingParams) -> list[Job]:
        """Send a request to an engine; a job for each of its `n` outputs.

        Raises InputError for one that can never be computed, Overloaded past the queue's end, Unavailable.
        """
        params = replace(params, adapter=self._adapter)
        self.check_ready().limits.check(prompt, params)
        if self.engines.num_jobs + params.n > self.engines.max_jobs:
            raise Overloaded(
                f"{self.label} has {self.engines.num_jobs} requests, and room for no more"
            )
        now = time.perf_counter()
        jobs = [
            Job(
                next(self.engines.ids), self.label, prompt,
                replace(params, n=1, seed=params.seed + i), now,
            )
            for i in range(params.n)
        ]  # fmt: skip
        self.engines.choose(prompt, params.adapter).submit(jobs, prompt, params)
        return jobs

    def submit_all(self, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[list[Job]]:
        """The jobs of several requests, of all or none. Raises as `submit`."""
        jobs: list[list[Job]] = []
        try:
            for prompt, params in asked:
                jobs.append(self.submit(prompt, params))
        except BaseException:
            for job in itertools.chain(*jobs):
                self.cancel(job)
            raise
        return jobs

    def cancel(self, job: Job) -> None:
        """End a job at once. One that is done stays as it is."""
        if any(replica.cancel(job) for replica in self.engines.replicas):
            self._metrics.cancelled(self.label)
            job.fail(Unavailable("the request was cancelled"))  # for whoever still waits for it

    async def close(self) -> None:
        """Jobs that are left fail, and the processes end unless another model uses them."""
        self._closing = True
        self.engines.models.discard(self.label)
        self._metrics.stands(
            self.label, running=0, waiting=0, preemptions=0, free_blocks=0, num_blocks=0
        )
        if not self.engines.models:
            await self.engines.close()
            return
        for replica in self.engines.replicas:
            for job in replica.jobs_of(self.label):
                replica.cancel(job)
                job.fail(Unavailable(f"{self.label} was unloaded"))
                self._metrics.failed(self.label)
