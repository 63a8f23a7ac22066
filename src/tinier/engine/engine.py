"""The engine: add requests, call `step()` until they are done.

engine = Engine(open_model("smollm2-135m"), EngineConfig())
for output_ids in engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16)): ...
"""

import logging
import time
from collections.abc import Iterator

import torch

from tinier.checkpoint import Checkpoint
from tinier.device import free_memory_bytes, pick_device
from tinier.engine.blocks import BlockPool
from tinier.engine.config import EngineConfig
from tinier.engine.decoder import Decoder, load_decoder
from tinier.engine.request import Request, SamplingParams
from tinier.engine.runner import Runner
from tinier.engine.sampler import sample
from tinier.engine.scheduler import Scheduler
from tinier.errors import InputError

log = logging.getLogger(__name__)


class Engine:
    def __init__(
        self,
        model: Checkpoint | Decoder,
        config: EngineConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the model, unless it is loaded, and make room for the cache. dtype: None computes in
        the checkpoint's."""
        self.config = config or EngineConfig()
        if isinstance(model, Decoder):
            decoder = model
        else:
            decoder = load_decoder(model, device=pick_device(self.config.device), dtype=dtype)
            _log_paths(model.folder.name, decoder)
        self.decoder = decoder
        self.max_seq_len = min(self.config.max_seq_len, decoder.geometry.max_positions)
        self._pool = BlockPool(self._num_blocks(), self.config.block_size)
        self.runner = Runner(
            decoder, self._pool.num_blocks, self.config.block_size, self.config.max_batch_size,
            self.max_seq_len,
        )  # fmt: skip
        self._scheduler = Scheduler(
            self._pool, self.config.max_batch_size, self.config.max_step_tokens
        )

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def add(self, prompt: list[int], params: SamplingParams) -> Request:
        """Queue a request. Raises InputError for a prompt that is empty, too long, or not of this
        vocabulary."""
        self._check(prompt, params)
        request = Request(prompt, params, arrived=time.perf_counter())
        self._scheduler.add(request)
        return request

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt:
            raise InputError("the prompt is empty. Give at least one token.")
        if not all(0 <= token < self.decoder.geometry.vocab for token in prompt):
            raise InputError(f"the prompt has ids outside 0..{self.decoder.geometry.vocab - 1}.")
        total = len(prompt) + params.max_tokens
        room = min(self.max_seq_len, self._pool.num_blocks * self._pool.block_size)
        if total > room:
            raise InputError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) need {total} "
                f"positions; this engine has {room}. Shorten one of them."
            )

    def step(self) -> list[Request]:
        """Compute one step; returns the requests that got a token."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        logits = self.runner.run(chunks)
        for chunk in chunks:
            chunk.request.num_computed = chunk.start + chunk.count
        ends = [i for i, chunk in enumerate(chunks) if chunk.samples]
        ready = [chunks[i].request for i in ends]
        tokens = sample(logits[ends], ready) if ready else []
        now = time.perf_counter()
        for request, token in zip(ready, tokens, strict=True):
            self._append(request, token, now)
        return ready

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
        """Output ids of each prompt, computed together."""
        for prompt in prompts:  # all or none
            self._check(prompt, params)
        requests = [self.add(prompt, params) for prompt in prompts]
        while self.has_work:
            self.step()
        return [request.output for request in requests]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """Output ids of one prompt, each as soon as it is there."""
        request = self.add(prompt, params)
        sent = 0
        while request.finished is None:
            self.step()
            yield from request.output[sent:]
            sent = len(request.output)

    def _append(self, request: Request, token: int, now: float) -> None:
        if token in request.params.stop_token_ids:
            request.finished = "stop"
        else:
            request.output.append(token)
            request.token_times.append(now)
            if len(request.output) == request.params.max_tokens:
                request.finished = "length"
        if request.finished:
            self._scheduler.finish(request)

    def _num_blocks(self) -> int:
        g = self.decoder.geometry
        block_bytes = (
            2 * g.layers * g.kv_heads * g.head_dim
            * self.decoder.cache_dtype.itemsize * self.config.block_size
        )  # fmt: skip
        per_request = -(-self.max_seq_len // self.config.block_size)
        if self.config.kv_cache_bytes is not None:
            blocks = self.config.kv_cache_bytes // block_bytes
        else:
            full = per_request * self.config.max_batch_size
            blocks = min(full, free_memory_bytes(self.decoder.device) // 2 // block_bytes)
        if blocks < 1:
            raise InputError(
                f"the KV cache has no room for one block of {block_bytes} bytes. "
                "Give it more: kv_cache_bytes."
            )
        return blocks


def _log_paths(name: str, decoder: Decoder) -> None:
    for path, fast in decoder.paths.items():
        level = logging.INFO if fast else logging.WARNING
        log.log(level, "%s runs as %s%s", name, path,
                "" if fast else f": {decoder.device.type} has no fast path for it")  # fmt: skip
