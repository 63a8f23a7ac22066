"""Continuous batching: which tokens of which requests the next step computes.

Every running request computes its next token; what is left of the step's token budget goes to
prompts, in order of arrival, a long one in chunks. When the cache is full the request that came
last gives its blocks back and waits; it is computed again later, prompt and output, so nothing is
lost.

The plan for a step may be made while the one before it is still being computed: a token that is not
known yet counts (`Request.num_pending`), only its value is filled in later.
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
    drafts: int = 0
    """Of those, the last ones, which are the request's draft."""

    @property
    def end(self) -> int:
        """Where its tokens that are no draft end."""
        return self.start + self.count - self.drafts

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last token, so that the next one can be sampled."""
        return self.end == self.request.num_tokens


class Scheduler:
    def __init__(
        self, pool: BlockPool, max_batch_size: int, max_step_tokens: int, *, reuse_prefixes: bool
    ) -> None:
        self._pool = pool
        self._reuse_prefixes = reuse_prefixes
        self._max_step_tokens = max_step_tokens
        self._seats = list(range(max_batch_size - 1, -1, -1))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, those of one token first; empty if nothing can be done before
        the tokens of the step in flight are known."""
        budget = self._max_step_tokens
        chunks: list[Chunk] = []
        # those that wait for one token first: a long prompt never makes them wait
        for request in sorted(self.running, key=lambda r: r.num_tokens - r.num_computed > 1):
            if request.seat is None:
                continue  # preempted a moment ago
            count = min(budget, request.num_tokens - request.num_computed)
            if count and self._make_room(request, request.num_computed + count):
                chunks.append(Chunk(request, request.num_computed, count))
                budget -= count
        chunks = [chunk for chunk in chunks if chunk.request.seat is not None]
        while self.waiting and budget and self._seats:
            request = self.waiting[0]
            if request.num_pending:
                break  # preempted with a token in flight
            reuses = self._reuse_prefixes and request.may_reuse
            start = self._pool.reuse(request) if reuses else 0
            count = min(budget, request.num_tokens - start)
            if not self._pool.extend(request, start + count):
                self._pool.release(request)
                break
            request.num_computed = start
            if not request.output:  # else it was preempted, and finds its own blocks
                request.num_reused = start
            request.seat = self._seats.pop()
            self.running.append(self.waiting.popleft())
            chunk = Chunk(request, start, count)
            chunks.append(chunk)
            budget -= count
            if count > 1:
                # a step writes all keys and values of a layer before any is read, so the next prompt may
                # use these already; single tokens are written while others read
                self.computed(chunk)
        for i, chunk in enumerate(chunks):  # last: no token waits, and none gives way, for a draft
            drafts = self._drafts(chunk, budget)
            if drafts:
                chunks[i] = Chunk(chunk.request, chunk.start, chunk.count + drafts, drafts)
                budget -= drafts
        chunks.sort(key=lambda chunk: chunk.count > 1)
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The chunk's step is on its way to the device: whatever comes later will find it computed."""
        chunk.request.num_computed = chunk.end
        self._remember(chunk.request)

    def finish(self, request: Request) -> None:
        """Give back what the request holds, whether it runs or waits."""
        request.queued = False
        if request.seat is None:
            self.waiting.remove(request)
            return
        self._remember(request)
        self._leave(request)

    def _remember(self, request: Request) -> None:
        if self._reuse_prefixes:
            self._pool.remember(request)

    def _drafts(self, chunk: Chunk, budget: int) -> int:
        """Tokens of a request's draft that are computed behind its chunk: all, or what the step holds."""
        count = min(len(chunk.request.draft), budget) if chunk.samples else 0
        return count if count and self._pool.extend(chunk.request, chunk.end + count) else 0

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens`, taken from the latest arrivals if need be; False if `request`
        itself had to give way."""
        while not self._pool.extend(request, num_tokens):
            victim = self.running[-1]
            self._leave(victim)
            victim.num_computed = 0
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is request:
                return False
        return True

    def _leave(self, request: Request) -> None:
        self._pool.release(request)
        assert request.seat is not None
        self._seats.append(request.seat)
        request.seat = None
        self.running.remove(request)
