"""The engine: add requests, call `step()` until they are done.

engine = Engine(open_model("smollm2-135m"), EngineConfig())
for output_ids in engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16)): ...

On a GPU a step is launched before the tokens of the one before it are read, so that the device never
waits for the host: `step()` returns what the previous call launched.
"""

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.device import free_memory_bytes, pick_device, upload
from tinier.engine.blocks import BlockPool
from tinier.engine.config import EngineConfig
from tinier.engine.crew import Crew, crew_for
from tinier.engine.decoder import Decoder, load_decoder
from tinier.engine.drafts import PROMPT, Drafter, DraftModel, PromptLookup, draft_model
from tinier.engine.grammar import Grammars, Matcher
from tinier.engine.pace import MEASURED, Pace
from tinier.engine.request import Limits, Request, SamplingParams, TokenLogprobs
from tinier.engine.runner import Output, Runner, most_graphs
from tinier.engine.sampler import Sampled, Sampler, scores
from tinier.engine.scheduler import Chunk, Scheduler
from tinier.engine.text import TextStream
from tinier.errors import InputError
from tinier.tokenizer import check_same_tokens

log = logging.getLogger(__name__)

# rows of logits made at once for positions inside a prompt
_LOGIT_ROWS = 256


class InFlight(NamedTuple):
    """A step whose tokens have been sampled on the device and are on their way to the host."""

    requests: list[Request]
    sampled: Sampled
    """On the host, once `done`"""
    done: torch.cuda.Event | None


class Check(NamedTuple):
    """A request's draft, beside what the model says."""

    request: Request
    first: int
    """Row of the logits before the draft"""
    draft: list[int]
    accepted: int
    """Tokens of its drafts that were right before"""

    @property
    def in_turn(self) -> bool:
        """Whether a token depends on the draft's before it by more than its logits."""
        penalized = self.request.params.penalized or self.request.matcher is not None
        return bool(self.draft) and penalized


class Engine:
    def __init__(
        self,
        model: Checkpoint | Decoder,
        config: EngineConfig | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        draft: Decoder | None = None,
    ) -> None:
        """Load the model, unless it is loaded, and make room for the cache.

        dtype: None computes in the checkpoint's. tokenizer: needed for stop strings alone. draft: what
        config.draft names, where it is loaded already. Raises InputError for a draft with other tokens.
        """
        self.config = config or EngineConfig()
        self._crew: Crew | None = None
        self._added = 0
        small = draft_model(self.config) if draft is None else None
        if small is not None and isinstance(model, Checkpoint):
            check_same_tokens(model, small)
        self.num_drafted = self.num_accepted = 0
        """Tokens that drafts proposed and the model checked, and those that were right"""
        if isinstance(model, Decoder):
            decoder = model
        else:
            decoder = self._load(model, dtype, tokenizer)
            _log_paths(model.folder.name, decoder)
        self.decoder = decoder
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._draft_decoder = draft
        if small is not None:
            self._draft_decoder = load_decoder(
                small, device=decoder.device, dtype=dtype, int4_inputs=self.config.int4_inputs
            )
            _log_paths(small.folder.name, self._draft_decoder)
        self.num_blocks = self._num_blocks()
        room = self.num_blocks * self.config.block_size
        self.max_seq_len = self.config.longest(decoder.geometry, room)
        self.max_input_len = min(self.config.max_input_len or self.max_seq_len, self.max_seq_len)
        on_gpu = decoder.device.type == "cuda"
        self._overlap = on_gpu if self.config.overlap is None else self.config.overlap
        self._pace = Pace(
            self.config.max_draft_tokens,
            model=self._draft_decoder is not None,
            overlaps=self._overlap,
        )
        self.drafter = self._drafter()
        self.runner = Runner(
            decoder, self.num_blocks, self.config.block_size, self.config.max_batch_size,
            self.max_seq_len, self.config.max_step_tokens,
            checks_drafts=self.drafter is not None,
        )  # fmt: skip
        self._clear()

    def _drafter(self) -> Drafter | None:
        if self._draft_decoder is None:
            return PromptLookup() if self.config.draft == PROMPT else None
        vocab = self.decoder.geometry.vocab
        return DraftModel(
            self._draft_decoder, self.config, self.max_seq_len, self.num_blocks, vocab, self._pace
        )

    def _load(self, model: Checkpoint, dtype: torch.dtype | None, tokenizer: Any) -> Decoder:
        """The model, or where several processes share it this one's part; the others load theirs."""
        device = pick_device(self.config.device)
        if self.config.tensor_parallel == 1:
            inputs = self.config.int4_inputs
            return load_decoder(
                model, device=device, dtype=dtype, int4_inputs=inputs, adapters=self.config.adapters
            )
        crew = crew_for(self.config.tensor_parallel, device)
        number = crew.build(model.folder, self.config, dtype, tokenizer)
        try:
            decoder = load_decoder(model, device=device, dtype=dtype, share=crew.share)
        except BaseException:
            crew.give_up(number)
            raise
        crew.go(number)
        self._crew, self._number = crew, number
        weakref.finalize(self, crew.drop, number)
        return decoder

    def _tell(self, method: str, *arguments: Any) -> None:
        """Let the other processes do what this one is about to."""
        if self._crew is not None:
            self._crew.call(self._number, method, *arguments)

    def reset(self) -> None:
        """Forget every request and every cached prefix, as after an error in a step."""
        self._tell("reset")
        self._clear()

    def _clear(self) -> None:
        self._pool = BlockPool(self.num_blocks, self.config.block_size)
        self._scheduler = Scheduler(
            self._pool, self.config.max_batch_size, self.config.max_step_tokens,
            reuse_prefixes=self.config.reuse_prefixes,
        )  # fmt: skip
        self._sampler = Sampler(self.decoder.geometry.vocab, self.decoder.device)
        self._in_flight: InFlight | None = None
        self._plain_steps = 0
        """Since drafts were checked"""
        self._wanted: dict[Request, int] | None = None
        """Drafts that wait for the step in flight"""
        self._pace.clear()
        if self.drafter is not None:
            self.drafter.forget()

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running or self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def warm_up(self) -> None:
        """Do what comes but once now, so that no request waits for it; on a CPU there is nothing."""
        self.capture()
        if self.drafter is not None and self.decoder.device.type == "cuda":
            self.measure_drafts(self.drafter)

    def capture(self) -> None:
        """Capture the graphs of all steps; a CPU has none."""
        self._tell("capture")
        self.runner.capture_all()
        if isinstance(self.drafter, DraftModel):
            self.drafter.runner.capture_all()

    def measure_drafts(self, drafter: Drafter) -> None:
        """Steps without drafts and with drafts of several lengths, of one request and of several, before
        any is there: the first of each take longer than all others, and from the others the pace learns
        what drafts cost."""
        for count in (1, 4, 16):
            lengths = [*range(1, self.config.max_draft_tokens + 1)] if count == 1 else [1, 3]
            tokens = 1 + MEASURED + 3 + sum(1 + length for length in lengths) * MEASURED
            blocks = -(-(1 + tokens) // self.config.block_size) * count
            fits = count <= self.config.max_batch_size and blocks <= self._pool.num_free
            if count == 1 or fits:
                self._measure_drafts(drafter, count, lengths)
        self.num_drafted = self.num_accepted = 0
        self._pace.clear()

    def _measure_drafts(self, drafter: Drafter, count: int, lengths: list[int]) -> None:
        room = self.limits.room - 1
        if room < 1:
            return
        requests = [self.add([0], SamplingParams(max_tokens=room)) for _ in range(count)]
        for _ in range(MEASURED + 3):  # with the prompt, and of those that overlap two say nothing
            self.compute_together({})
        self.compute_together(None)
        for length in lengths * MEASURED:
            if any(r.finished or r.num_sampled + length >= room for r in requests):
                break
            proposed = drafter.propose(dict.fromkeys(requests, length))
            drafts = {r.number: (proposed.get(r, []) + [0] * length)[:length] for r in requests}
            self.compute_together(drafts)
        for request in requests:
            self.cancel(request)

    def add(self, prompt: list[int], params: SamplingParams) -> Request:
        """Queue a request. Raises InputError for a prompt that is empty, too long, or not of this
        vocabulary, and for `params.n` above 1 (see `add_all`)."""
        if params.n > 1:
            raise InputError(f"n={params.n} makes several requests. Use add_all.")
        self._check(prompt, params)
        given, stream = params, None
        if params.stop:
            stream = TextStream(
                self._tokenizer, params.stop, params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )  # fmt: skip
        if params.stop and params.skip_special_tokens:
            # a special token is no part of the text, so it is known by its number
            special = self._tokenizer.special_ids
            ends = {special[text] for text in params.stop if text in special}
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *sorted(ends)))
        matcher = self._matcher(params) if params.grammar is not None else None
        self._tell("add", prompt, given)
        self._added += 1
        request = Request(
            self._added, prompt, params, time.perf_counter(), self.runner.width, stream, matcher
        )
        self._scheduler.add(request)
        return request

    def _matcher(self, params: SamplingParams) -> Matcher:
        assert params.grammar is not None
        if self._grammars is None:
            if self._tokenizer is None:
                raise InputError("a grammar needs the tokenizer. Use Engine(…, tokenizer=…).")
            self._grammars = Grammars(
                self._tokenizer, self.decoder.geometry.vocab, self.decoder.device
            )
        return self._grammars.matcher(params.grammar, params.stop_token_ids)

    def add_all(self, prompt: list[int], params: SamplingParams) -> list[Request]:
        """Queue `params.n` requests for one prompt, with the seeds `seed`, `seed` + 1 and so on. They
        share the prompt's blocks."""
        single = replace(params, n=1)
        return [self.add(prompt, replace(single, seed=params.seed + i)) for i in range(params.n)]

    def cancel(self, request: Request) -> None:
        """End a request now; its memory is free at once. One that is done stays as it is."""
        if request.finished is None:
            self._tell("cancel", request.number)
            self._end(request, "cancelled")

    @property
    def limits(self) -> Limits:
        room = min(self.max_seq_len, self.num_blocks * self.config.block_size)
        count = self.decoder.chosen.count
        return Limits(self.decoder.geometry.vocab, self.max_input_len, room, count)

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        self.limits.check(prompt, params)
        if params.stop and self._tokenizer is None:
            raise InputError("stop strings need the tokenizer. Use Engine(…, tokenizer=…).")

    def step(self) -> list[Request]:
        """Compute one step; returns the requests that got a token, or reached their end."""
        drafts = self._propose() if self.drafter is not None else {}
        return self.compute_together(drafts)

    def compute_together(self, drafts: dict[int, list[int]] | None) -> list[Request]:
        """`compute` in all processes of a shared model."""
        if self._crew is None:
            return self.compute(drafts)
        self._tell("compute", drafts)
        with self._crew.together():
            return self.compute(drafts)

    def _propose(self) -> dict[int, list[int]] | None:
        """Drafts by their request's number; None: they would pay, but steps in flight must end first."""
        assert self.drafter is not None
        # those that a step computes one token of
        requests = [
            r
            for r in self._scheduler.running
            if not r.finished and r.num_tokens - r.num_computed <= 1
        ]
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            if self._pace.rests():
                return {}
            started = time.perf_counter()
            unread = {request: self.drafter.unread(request) for request in requests}
            can = {request: count for request, count in unread.items() if count is not None}
            wanted = self._pace.lengths(can, len(requests))
            if not wanted:
                self._pace.looked(time.perf_counter() - started, len(requests))
        if not wanted:
            return {}
        if self._in_flight is not None:
            self._wanted = wanted
            return None
        wanted = {request: count for request, count in wanted.items() if request in requests}
        found = self.drafter.propose(wanted)
        return {request.number: tokens for request, tokens in found.items() if tokens}

    def compute(self, drafts: dict[int, list[int]] | None) -> list[Request]:
        """One step, in each process of a shared model; see `step`. drafts: of `_propose`."""
        self._plain_steps = 0 if drafts or drafts is None else self._plain_steps + 1
        if drafts is None:
            launched, self._in_flight = self._in_flight, None
            return self._read(launched) if launched else []
        step = partial(self._check_drafts, drafts) if drafts else self._step
        return step() if self.drafter is None else self._timed(step, drafts)

    def _timed(
        self, step: Callable[[], list[Request]], drafts: dict[int, list[int]]
    ) -> list[Request]:
        """The step; what it took is told to the pace, unless it has a prompt in it."""
        started = time.perf_counter()
        waiting, running = len(self._scheduler.waiting), self._scheduler.running
        rows = sum(r.num_tokens - r.num_computed for r in running)
        decodes = rows == len(running) > 0
        changed = step()
        # the first steps that overlap begin before the one before ends, so they seem short
        whole = bool(drafts) or not self._overlap or self._plain_steps > 2
        if whole and decodes and waiting == len(self._scheduler.waiting):
            rows += sum(map(len, drafts.values()))
            self._pace.step_took(time.perf_counter() - started, rows, drafts=bool(drafts))
        return changed

    def _step(self) -> list[Request]:
        """The next step sent to the device, and the tokens read of the one before, or of this one where
        steps do not overlap."""
        chunks = self._scheduler.schedule()
        output = self._run(chunks) if chunks else None
        changed = []
        before, self._in_flight = self._in_flight, None
        if before is not None and any(chunk.request.matcher is not None for chunk in chunks):
            # what may come next depends on the token in flight: it is read while the step runs
            changed, before = self._read(before), None
        if output is not None:
            self._in_flight = self._launch_sampling(chunks, output)
        if not self._overlap:
            before, self._in_flight = self._in_flight, None
        return changed + (self._read(before) if before is not None else [])

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
        """Output ids of each prompt, computed together."""
        for prompt in prompts:  # all or none
            self._check(prompt, params)
        requests = [self.add(prompt, params) for prompt in prompts]
        while self.has_work:
            self.step()
        for request in requests:
            self._check_numbers(request)
        return [request.output for request in requests]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """Output ids of one prompt, each as soon as it is there."""
        request = self.add(prompt, params)
        sent = 0
        while request.finished is None:
            self.step()
            yield from request.output[sent:]
            sent = len(request.output)
        self._check_numbers(request)

    def _check_numbers(self, request: Request) -> None:
        """Raise InputError for a request that ended because the model gave no numbers."""
        if request.finished == "error":
            raise InputError(self.overflow(request.prompt + request.output, request.params.adapter))

    def overflow(self, tokens: list[int], adapter: int = 0) -> str:
        """Where these tokens stop being numbers on their way through the model, for people. adapter: as
        in SamplingParams."""
        self._tell("overflow", tokens, adapter)
        of_token = torch.full((len(tokens),), adapter, device=self.decoder.device)
        with self.decoder.chosen.be(of_token):
            return self.decoder.overflow(torch.tensor([tokens]))

    def _run(self, chunks: list[Chunk]) -> Output:
        """Send the model's part of a step to the device."""
        output = self.runner.run(chunks)
        self._keep_prompt_logits(chunks, output)
        for chunk in chunks:
            self._scheduler.computed(chunk)
        return output

    def _launch_sampling(self, chunks: list[Chunk], output: Output) -> InFlight | None:
        """Send the rest of a step to the device; None: none of the requests gets a token."""
        ends = [i for i, chunk in enumerate(chunks) if chunk.samples and not chunk.request.finished]
        requests = [chunks[i].request for i in ends]
        if not requests:
            return None
        sampled = self._sample(output, ends, requests)
        for request in requests:
            request.num_pending += 1
            if request.num_sampled == request.params.max_tokens:
                # the device works in order, so its blocks may go to whoever comes next
                self._scheduler.finish(request)
        return self._fetch(requests, sampled)

    @torch.inference_mode()
    def _sample(self, output: Output, rows: list[int], requests: list[Request]) -> Sampled:
        """The next token of the requests whose chunks these are."""
        sampled = self._pick(output, rows, requests, [r.num_sampled for r in requests])
        if not all(request.params.plain for request in requests):
            self.runner.keep(requests, sampled.tokens)
        return sampled

    @torch.inference_mode()
    def _pick(
        self, output: Output, rows: list[int], requests: list[Request], positions: list[int]
    ) -> Sampled:
        """The tokens of some rows, each of its request at its place in the output."""
        logits, tokens = self.runner.rows(output, rows)
        if all(request.params.plain for request in requests):
            return Sampled(tokens, None, None, None)
        return self._sampler.sample(logits, requests, positions, self._allowed(requests))

    def _allowed(self, requests: list[Request]) -> Tensor | None:
        """The tokens that grammars allow, as `Grammars.allowed` gives them; None: none of these has one."""
        if self._grammars is None or all(request.matcher is None for request in requests):
            return None
        rows = [i for i, request in enumerate(requests) if request.matcher is not None]
        some = self._grammars.allowed([requests[i].matcher for i in rows])
        if len(rows) == len(requests):
            return some
        every = some.new_full((len(requests), some.shape[1]), -1)
        return every.index_copy_(0, upload(rows, torch.int64, some.device), some)

    def _fetch(self, requests: list[Request], sampled: Sampled) -> InFlight:
        """Start to copy what was sampled to the host."""
        if self.decoder.device.type == "cpu":
            return InFlight(requests, sampled, None)
        host = Sampled(*(_to_host(t) for t in sampled))
        done = torch.cuda.Event()
        done.record()
        return InFlight(requests, host, done)

    def _read(self, step: InFlight) -> list[Request]:
        """Hand the tokens of a launched step to their requests."""
        if step.done is not None:
            step.done.synchronize()
        now = time.perf_counter()
        tokens: list[int] = step.sampled.tokens.tolist()
        self._follow(step.requests, tokens)
        changed = []
        for i, (request, token) in enumerate(zip(step.requests, tokens, strict=True)):
            request.num_pending -= 1
            if request.finished:  # stopped or cancelled while this token was on its way
                continue
            self._take(request, step.sampled, i, token, now)
            changed.append(request)
        return changed

    def _follow(self, requests: list[Request], tokens: list[int]) -> None:
        """Tell the grammars that requests have the tokens that were sampled for them."""
        if self._grammars is not None:
            self._grammars.follow([
                (request.matcher, token)
                for request, token in zip(requests, tokens, strict=True)
                if request.matcher is not None and request.finished is None
                and token >= 0 and token not in request.params.stop_token_ids
            ])  # fmt: skip

    def _take(self, request: Request, sampled: Sampled, row: int, token: int, now: float) -> None:
        """Give a request the token that was sampled in a row."""
        if token < 0:  # logits that are no numbers have no likeliest token
            self._end(request, "error")
            return
        if request.params.logprobs is not None:
            request.logprobs.append(_logprobs(sampled, row, token, request.params.logprobs))
        self._append(request, token, now)

    def _check_drafts(self, drafts: dict[int, list[int]]) -> list[Request]:
        """A step that computes drafts too, and whose tokens are read at once: of each request those of its
        draft that are right, and the one after."""
        assert self._in_flight is None
        for request in self._scheduler.running:
            request.draft = drafts.get(request.number, [])
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        output = self._run(chunks)
        firsts = accumulate((1 + chunk.drafts for chunk in chunks), initial=0)
        checks = []
        for chunk, first in zip(chunks, firsts, strict=False):
            if chunk.samples:
                draft = chunk.request.draft[: chunk.drafts]
                checks.append(Check(chunk.request, first, draft, chunk.request.num_accepted))
        for request in [*self._scheduler.waiting, *self._scheduler.running]:
            request.draft = []
        self._compare(output, [check for check in checks if not check.in_turn])
        for check in checks:
            if check.in_turn:
                self._compare_in_turn(output, check)
        for request, _, draft, before in checks:
            request.num_drafted += len(draft)
            self.num_drafted += len(draft)
            self.num_accepted += request.num_accepted - before
            if draft and request.finished is None:
                self._pace.agreed(request, request.num_accepted - before, len(draft))
        return [check.request for check in checks]

    def _compare(self, output: Output, checks: list[Check]) -> None:
        rows = [(c, depth) for c in checks for depth in range(1 + len(c.draft))]
        if not rows:
            return
        sampled = self._pick(
            output, [c.first + depth for c, depth in rows], [c.request for c, _ in rows],
            [c.request.num_sampled + depth for c, depth in rows],
        )  # fmt: skip
        now, at = time.perf_counter(), 0
        tokens = sampled.tokens.tolist()
        for check in checks:
            for depth in range(1 + len(check.draft)):
                if not self._agrees(check, depth, sampled, at + depth, tokens[at + depth], now):
                    break
            at += 1 + len(check.draft)

    def _compare_in_turn(self, output: Output, check: Check) -> None:
        request = check.request
        for depth in range(1 + len(check.draft)):
            sampled = self._pick(output, [check.first + depth], [request], [request.num_sampled])
            now = time.perf_counter()
            if not self._agrees(check, depth, sampled, 0, int(sampled.tokens), now):
                break

    def _agrees(
        self, check: Check, depth: int, sampled: Sampled, row: int, token: int, now: float
    ) -> bool:
        """Take a token that the model picked; whether it is the draft's, so that what follows counts."""
        request = check.request
        self._follow([request], [token])
        self._take(request, sampled, row, token, now)
        if depth == len(check.draft) or token != check.draft[depth]:
            return False
        request.num_accepted += 1
        request.num_computed += 1  # its keys and values are in the cache since this step
        return request.finished is None

    def _append(self, request: Request, token: int, now: float) -> None:
        if token in request.params.stop_token_ids:
            if request.logprobs:
                request.logprobs.pop()
            self._end(request, "stop")
            return
        request.output.append(token)
        request.token_times.append(now)
        if request.matcher is not None and request.matcher.is_stopped():  # nothing may follow
            self._end(request, "error" if request.matcher.is_error() else "stop")
            return
        if request.stream is not None:
            request.stream.push(token)
            if request.stream.stopped is not None:
                self._end(request, "stop")
                return
        if len(request.output) == request.params.max_tokens:
            self._end(request, "length")

    def _end(self, request: Request, reason: str) -> None:
        request.finished = reason
        if request.queued:
            self._scheduler.finish(request)
        self._sampler.forget(request)
        self._pace.forget(request)

    @torch.inference_mode()
    def _keep_prompt_logits(self, chunks: list[Chunk], output: Output) -> None:
        """Logits, or log-probabilities, at the prompt positions of requests that ask for them."""
        row = 0
        for chunk in chunks:
            request, params = chunk.request, chunk.request.params
            # one that was preempted computes its prompt again
            first = max(chunk.start, request.num_scored)
            last = min(chunk.start + chunk.count, len(request.prompt))
            if output.hidden is not None and not request.may_reuse and first < last:
                offset = row - chunk.start
                states = output.hidden[offset + first : offset + last]
                if params.pooling:
                    request.pool(states.float())
                if params.prompt_logits or params.prompt_logprobs is not None:
                    self._score_prompt(request, first, states)
                request.num_scored = last
            row += chunk.count

    def _score_prompt(self, request: Request, first: int, states: Tensor) -> None:
        """Take down the logits, or log-probabilities, after a prompt's tokens from `first` on.

        states: [n, hidden] after them.
        """
        params = request.params
        for rows in states.split(_LOGIT_ROWS):
            last = first + len(rows)
            logits = self.decoder.logits(rows).float()
            if params.prompt_logits:
                request.prompt_logits.append(logits.cpu())
            if params.prompt_logprobs is not None:
                following = request.prompt[first + 1 : last + 1]
                request.prompt_logprobs += _prompt_logprobs(
                    logits, following, params.prompt_logprobs
                )
            first = last

    @property
    def cache_bytes(self) -> int:
        """Of the KV cache, in all processes together, and of the draft's."""
        draft = self._draft_decoder
        whole = self._block_bytes * self.decoder.share.size
        return self.num_blocks * (whole + (self._block_bytes_of(draft) if draft else 0))

    @property
    def weight_bytes(self) -> int:
        """Of the model in this process, and of the draft."""
        draft = self._draft_decoder
        return self.decoder.weight_bytes + (draft.weight_bytes if draft else 0)

    @property
    def _block_bytes(self) -> int:
        return self._block_bytes_of(self.decoder)

    def _block_bytes_of(self, decoder: Decoder) -> int:
        numbers = decoder.geometry.cached_numbers
        return numbers * decoder.cache_dtype.itemsize * self.config.block_size

    def _num_blocks(self) -> int:
        block_bytes = self._block_bytes
        if self._draft_decoder is not None:
            block_bytes += self._block_bytes_of(self._draft_decoder)
        per_request = -(-self.config.usual_len(self.decoder.geometry) // self.config.block_size)
        if self.config.kv_cache_bytes is not None:
            blocks = self.config.kv_cache_bytes // block_bytes
        else:
            free = free_memory_bytes(self.decoder.device)
            room = free // 2 if self.decoder.device.type == "cpu" else free - self._working_bytes()
            blocks = min(per_request * self.config.max_batch_size, room // block_bytes)
        blocks = self.decoder.share.least(blocks)  # the first process has the draft's too
        if blocks < 1:
            raise InputError(
                f"the KV cache has no room for one block of {block_bytes} bytes. "
                "Give it more: kv_cache_bytes."
            )
        return blocks

    def _working_bytes(self) -> int:
        """What a step needs beside weights and cache, estimated: activations, logits, graphs."""
        g = self.decoder.geometry
        widths = 3 * g.intermediate + 2 * (g.heads + 2 * g.kv_heads) * g.head_dim + 6 * g.hidden
        activations = self.config.max_step_tokens * widths * self.decoder.dtype.itemsize
        logits = (self.config.max_batch_size + _LOGIT_ROWS) * g.vocab * 4 * 4
        longest = self.config.longest(g, g.max_positions)
        # each graph has block tables of its own; cos and sin of every position
        graphs = most_graphs(self.config.max_batch_size, self.config.max_step_tokens)
        tables = graphs * self.config.max_batch_size * (longest // self.config.block_size) * 4
        turns = 2 * longest * g.turning * self.decoder.dtype.itemsize
        return int(1.2 * (activations + logits)) + tables + turns + (2 << 30)


def _to_host(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _logprobs(sampled: Sampled, row: int, token: int, count: int) -> TokenLogprobs:
    assert sampled.logprobs is not None
    assert sampled.top_logprobs is not None
    assert sampled.top_tokens is not None
    ids, values = sampled.top_tokens[row, :count], sampled.top_logprobs[row, :count]
    top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, sampled.logprobs[row].item(), top)


def _prompt_logprobs(logits: Tensor, following: list[int], count: int) -> list[TokenLogprobs]:
    """Of the tokens that follow each row of logits [n, vocab] in the prompt; the last row may have none."""
    tokens = torch.tensor(following, device=logits.device)
    rows = (t.tolist() for t in scores(logits[: len(tokens)], tokens, count))
    return [
        TokenLogprobs(token, logprob, dict(zip(ids, values, strict=True)))
        for token, logprob, values, ids in zip(following, *rows, strict=True)
    ]


def _log_paths(name: str, decoder: Decoder) -> None:
    for path, fast in decoder.paths.items():
        level = logging.INFO if fast else logging.WARNING
        log.log(level, "%s runs as %s%s", name, path,
                "" if fast else f": {decoder.device.type} has no fast path for it")  # fmt: skip
