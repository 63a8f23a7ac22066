"""Continuous batching: which tokens of which requests the next step computes.

Every running request computes its next token; what is left of the step's token budget goes to
prompts, in order of arrival, a long one in chunks. When the cache is full the request that came
last gives its blocks back and waits; it is computed again later, prompt and output, so nothing is
lost.
"""

from collections import deque
from dataclasses import dataclass

from tinier.engine.blocks import BlockPool
from tinier.engine.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of one request, to be computed in this step."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether this chunk ends at the last known token, so that the next one can be sampled."""
        return self.start + self.count == self.request.num_tokens


class Scheduler:
    def __init__(self, pool: BlockPool, max_batch_size: int, max_step_tokens: int) -> None:
        self._pool = pool
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, those of one token first; empty only if nothing is to do."""
        budget = self._max_step_tokens
        chunks: list[Chunk] = []
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted a moment ago
            count = min(budget, request.num_tokens - request.num_computed)
            if count and self._make_room(request, request.num_computed + count):
                chunks.append(Chunk(request, request.num_computed, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self._max_batch_size:
            request = self.waiting[0]
            count = min(budget, request.num_tokens)
            if not self._pool.extend(request, count):
                break
            self.running.append(self.waiting.popleft())
            chunks.append(Chunk(request, 0, count))
            budget -= count
        assert chunks or not (self.waiting or self.running), "nothing could be scheduled"
        chunks.sort(key=lambda chunk: chunk.count > 1)
        return chunks

    def finish(self, request: Request) -> None:
        self._pool.release(request)
        self.running.remove(request)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens`, taken from the latest arrivals if need be; False if `request`
        itself had to give way."""
        while not self._pool.extend(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._pool.release(request)
        request.num_computed = 0
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1
