"""Computes the chunks of one step: token ids to logits, through the paged KV cache.

A step of one token per sequence is the same few hundred kernels every time, so on a GPU it is captured
as a CUDA graph for each of a few batch sizes; a batch is padded to the next of them. Tokens that were
sampled but are not known to the host yet are read on the device, from the seat of their request.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinier.device import upload
from tinier.engine.decoder import Decoder
from tinier.engine.request import Request
from tinier.engine.scheduler import Chunk
from tinier.kernels import (
    LONG_CONTEXT,
    Cache,
    PagedBatch,
    cached_attention,
    embed,
    greedy,
    known_tokens,
    uses_triton,
)
from tinier.kernels.cpu_decode import CpuDecoder, DecodeWeights, unsupported

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """What a step computed; it holds until the next one."""

    logits: Tensor
    """[chunks, vocab] after each chunk's last token"""
    tokens: Tensor
    """[chunks] int64: the likeliest of each; the next step finds them at their request's seat"""
    hidden: Tensor | None
    """[T, hidden] after every token; None: the step made logits alone"""


class Captured:
    """One batch size's graph with the buffers that it reads and writes."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        self.output: Output | None = None


class Runner:
    """A decoder and its cache: for each layer keys and values [slots, kv_heads, head_dim]."""

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_seq_len: int,
    ) -> None:
        self.decoder = decoder
        self._block_size = block_size
        self._num_blocks = num_blocks
        self.width = -(-max_seq_len // block_size)
        g, device = decoder.geometry, decoder.device
        self._captures = uses_triton(device)
        # one block past those that are handed out: where a graph's padded rows write
        shape = ((num_blocks + self._captures) * block_size, g.kv_heads, g.head_dim)

        def cache(index: int) -> Cache:
            keys, values = (
                torch.zeros(shape, dtype=decoder.cache_dtype, device=device) for _ in range(2)
            )
            return Cache(keys, values, decoder.layers[index].kv_scales, g.windows[index])

        self._caches = [cache(index) for index in range(g.layers)]
        rotation = decoder.rotation(torch.arange(max_seq_len, device=device))
        self._head_inputs = [decoder.head_inputs(index, rotation) for index in range(g.layers)]
        # a seat for padded rows too
        self._sampled = torch.zeros(max_batch_size + 1, dtype=torch.int64, device=device)
        self._sizes = _batch_sizes(max_batch_size)
        self._captured: dict[tuple[int, bool], Captured] = {}
        self._memory: Any = None  # shared by all graphs
        self._staging: list[Tensor] = []
        self._native = self._native_step(rotation) if device.type == "cpu" else None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(
            t.numel() * t.element_size()
            for cache in self._caches
            for t in (cache.keys, cache.values)
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Output:
        """Compute the chunks and write their keys and values. On a GPU it returns before that is done."""
        counts = [chunk.count for chunk in chunks]
        longest = max(chunk.start + chunk.count for chunk in chunks)
        if self._captures and max(counts) == 1:
            size = next(size for size in self._sizes if size >= len(chunks))
            key = size, longest >= LONG_CONTEXT
            captured = self._captured.get(key) or self._capture(*key)
            captured.inputs.copy_(self._inputs(chunks, size), non_blocking=True)
            captured.graph.replay()
            assert captured.output is not None
            logits, tokens, hidden = captured.output
            assert hidden is not None
            count = len(chunks)
            return Output(logits[:count], tokens[:count], hidden[:count])
        inputs = self._inputs(chunks, sum(counts)).to(self.decoder.device, non_blocking=True)
        if self._native and max(counts) == 1 and not any(map(_scores_prompt, chunks)):
            return self._compute_natively(inputs, len(chunks))
        return self._compute(inputs, counts, sum(counts), longest)

    def rows(self, output: Output, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and likeliest tokens of some of the chunks."""
        if len(rows) == len(output.tokens):
            return output.logits, output.tokens
        index = upload(rows, torch.int64, self.decoder.device)
        return output.logits.index_select(0, index), output.tokens.index_select(0, index)

    def keep(self, requests: list[Request], tokens: Tensor) -> None:
        """Note tokens [len(requests)] that were sampled instead of the likeliest."""
        seats = [_seat(request) for request in requests]
        self._sampled.index_copy_(0, upload(seats, torch.int64, self.decoder.device), tokens)

    def _inputs(self, chunks: list[Chunk], rows: int) -> Tensor:
        """All that a step reads, as one int32 tensor on the host: tokens, positions and slots [rows],
        contexts and seats [B], starts [B + 1], block tables [B, width]. Rows past the chunks' are padding.

        A token that is not known yet is -1 - its request's seat.
        """
        count = len(chunks)
        single = chunks[-1].count == 1 if chunks else True
        sequences = rows if single else count
        packed = self._stage(3 * rows + 3 * sequences + 1 + sequences * self.width)
        values: NDArray[np.int32] = packed.numpy()
        tokens, positions, slots = (values[i * rows : (i + 1) * rows] for i in range(3))
        contexts, seats = values[3 * rows : 3 * rows + 2 * sequences].reshape(2, sequences)
        starts = values[3 * rows + 2 * sequences : 3 * rows + 3 * sequences + 1]
        tables = values[3 * rows + 3 * sequences + 1 :].reshape(sequences, self.width)
        ones = count if single else next(i for i, chunk in enumerate(chunks) if chunk.count > 1)
        if chunks:
            np.stack([chunk.request.table for chunk in chunks], out=tables[:count])
        at = [chunk.start for chunk in chunks[:ones]]
        positions[:ones] = at
        tokens[:ones] = [_last_token(chunk) for chunk in chunks[:ones]]
        size = self._block_size
        slots[:ones] = [
            chunk.request.blocks[start // size] * size + start % size
            for chunk, start in zip(chunks[:ones], at, strict=True)
        ]
        row = ones
        starts[: ones + 1] = range(ones + 1)
        for i in range(ones, count):
            chunk, end = chunks[i], row + chunks[i].count
            new = np.arange(chunk.start, chunk.start + chunk.count, dtype=np.int32)
            # only a request that computes one token a step has one in flight
            tokens[row:end] = chunk.request.tokens(chunk.start, chunk.count)
            positions[row:end] = new
            slots[row:end] = tables[i, new // size] * size + new % size
            row = starts[i + 1] = end
        contexts[:count] = [chunk.start + chunk.count for chunk in chunks]
        seats[:count] = [_seat(chunk.request) for chunk in chunks]
        if rows > row:  # padding
            for part in (tokens, positions):
                part[row:] = 0
            slots[row:] = self._num_blocks * size
            contexts[count:] = 0
            seats[count:] = len(self._sampled) - 1
            tables[count:] = 0
            starts[count + 1 :] = range(row + 1, row + 1 + sequences - count)
        return packed

    def _stage(self, size: int) -> Tensor:
        """Room on the host for a step's inputs. Two take turns: the device may still be reading what it
        was sent for the step in flight."""
        if not self._captures:
            return torch.empty(size, dtype=torch.int32)
        if len(self._staging) < 2 or self._staging[0].numel() < size:
            self._staging.insert(0, torch.empty(size, dtype=torch.int32, pin_memory=True))
            del self._staging[2:]
        packed = self._staging.pop(0)
        self._staging.append(packed)
        return packed[:size]

    def _native_step(self, rotation: tuple[Tensor, Tensor]) -> CpuDecoder | None:
        """The whole step as one native call, where the model and the machine allow it."""
        decoder = self.decoder
        weights = DecodeWeights(
            geometry=decoder.geometry, embedding=decoder.embedding, layers=decoder.layers,
            final_norm=decoder.final_norm, head=decoder.head,
        )  # fmt: skip
        reason = unsupported(weights, decoder.cache_dtype)
        if decoder.share.size > 1:
            reason = "the model is shared by several processes"
        if reason is not None:
            log.info("decode steps run operator by operator: %s", reason)
            return None
        return CpuDecoder(weights, self._caches, rotation, self._block_size)

    def _compute_natively(self, inputs: Tensor, count: int) -> Output:
        assert self._native is not None
        tokens, positions, slots, contexts, seats, _, tables = self._split(inputs, count, count)
        known = known_tokens(tokens, self._sampled).int()
        logits = self._native.step(known, positions, slots, contexts, tables)
        return Output(logits, greedy(logits, seats, self._sampled), None)

    def _split(self, inputs: Tensor, rows: int, sequences: int) -> tuple[Tensor, ...]:
        """What `_inputs` joined."""
        *parts, tables = inputs.split(
            [rows, rows, rows, sequences, sequences, sequences + 1, sequences * self.width]
        )
        return *parts, tables.view(sequences, self.width)

    def _compute(self, inputs: Tensor, counts: list[int], rows: int, longest: int) -> Output:
        sequences = len(counts)
        tokens, positions, slots, contexts, seats, starts, tables = self._split(
            inputs, rows, sequences
        )
        batch = PagedBatch(
            tables, contexts, starts, positions, slots, counts, self._block_size, longest
        )
        decoder = self.decoder

        def attend(index: int, qkv: Tensor) -> Any:
            return cached_attention(
                qkv, self._head_inputs[index], self._caches[index], batch,
                decoder.layers[index].out.takes,
            )  # fmt: skip

        hidden = decoder.forward(embed(tokens, self._sampled, decoder.embedding), attend)
        last = hidden if rows == sequences else hidden[starts[1:].long() - 1]
        logits = decoder.logits(last)
        return Output(logits, greedy(logits, seats, self._sampled), hidden)

    def _capture(self, size: int, is_long: bool) -> Captured:
        """The graph of one token for each of `size` sequences."""
        captured = Captured(self._inputs([], size).to(self.decoder.device))
        work = ([1] * size, size, LONG_CONTEXT if is_long else LONG_CONTEXT - 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and libraries start outside the capture
            self._compute(captured.inputs, *work)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(captured.graph, pool=self._memory):
            captured.output = self._compute(captured.inputs, *work)
        self._memory = captured.graph.pool()
        self._captured[size, is_long] = captured
        return captured


def _scores_prompt(chunk: Chunk) -> bool:
    """Whether logits inside the prompt are asked for."""
    return chunk.start < len(chunk.request.prompt) and not chunk.request.may_reuse


def _last_token(chunk: Chunk) -> int:
    """Of a chunk of one token; -1 - seat if its value is in flight."""
    if chunk.start == chunk.request.num_known:
        return -1 - _seat(chunk.request)
    return chunk.request.tokens(chunk.start, 1)[0]


def _seat(request: Request) -> int:
    assert request.seat is not None
    return request.seat


def _batch_sizes(largest: int) -> list[int]:
    """Batch sizes that are captured: a padded row costs little, a graph some memory."""
    sizes = [size for size in (1, 2, 4) if size < largest]
    return [*sizes, *range(8, largest, 8), largest]
