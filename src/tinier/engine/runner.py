"""Computes the chunks of one step: token ids to logits, through the paged KV cache.

A step is the same few hundred kernels every time, so on a GPU it is captured as a CUDA graph for each of a
few sizes, and what it computes is padded to the next of them: steps of one token per sequence, and steps
with prompts up to 4,096 tokens. Larger ones are launched operator by operator. Tokens that were
sampled but are not known to the host yet are read on the device, from the seat of their request.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinier.device import Staging, upload
from tinier.engine.decoder import Decoder
from tinier.engine.request import Request
from tinier.engine.scheduler import Chunk
from tinier.kernels import (
    LONG_CONTEXT,
    Cache,
    PagedBatch,
    cached_attention,
    captures,
    cpu_decode,
    gpu_decode,
    greedy,
    reference,
)
from tinier.kernels.cpu_decode import CpuDecoder
from tinier.kernels.gpu_decode import GpuDecoder
from tinier.kernels.layer import DecodeWeights

log = logging.getLogger(__name__)

# numbers of tokens in steps that check drafts: half as many requests at most
_DRAFT_ROWS = (8, 16, 32, 64)
# columns of block tables that are copied whole, used or not
_NARROW = 512


class Output(NamedTuple):
    """What a step computed; it holds until the next one."""

    logits: Tensor
    """[chunks, vocab] after each chunk's last token; where a chunk ends in a draft, after each token of it
    and the one before, too"""
    tokens: Tensor
    """The likeliest of each, int64, -1 where the logits are no numbers; the next step finds them at their
    request's seat, unless that has a draft"""
    hidden: Tensor | None
    """[T, hidden] after every token; None: the step made logits alone"""


class Shape(NamedTuple):
    """What a graph is captured for."""

    rows: int
    """Tokens"""
    sequences: int
    """As many as rows: each has one token. More rows: any mix, of any number up to this"""
    is_long: bool
    """Whether a context is"""
    every: bool = False
    """Logits after every token, not the last of each sequence: for steps that check drafts"""


class Captured:
    """The graph of one shape with the buffers that it reads and writes."""

    def __init__(self, inputs: Tensor, tables: Tensor) -> None:
        """tables: the part of the inputs, [sequences, width]."""
        self.inputs, self.tables = inputs, tables
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
        max_step_tokens: int,
        *,
        checks_drafts: bool = False,
        in_one_kernel: bool | None = None,
    ) -> None:
        """checks_drafts: steps that do so are captured too. in_one_kernel: whether the layers of steps of a
        few tokens are one kernel (gpu_decode.py); None: where it was measured to be faster."""
        self.decoder = decoder
        self._block_size = block_size
        self._num_blocks = num_blocks
        self.width = -(-max_seq_len // block_size)
        g, device = decoder.geometry, decoder.device
        self._captures = captures(device, decoder.cache_dtype) and all(
            layer.experts is None or layer.experts.are_grouped for layer in decoder.layers
        )
        # one block past those that are handed out: where a graph's padded rows write
        shape = ((num_blocks + self._captures) * block_size, g.kv_heads, g.head_dim)

        def cache(index: int) -> Cache:
            keys, values = (
                torch.zeros(shape, dtype=decoder.cache_dtype, device=device) for _ in range(2)
            )
            return Cache(keys, values, decoder.layers[index].kv_scales, g.kinds[index].window)

        self._caches = [cache(index) for index in range(g.layers)]
        rotations = decoder.rotations(torch.arange(max_seq_len, device=device), max_seq_len)
        self._head_inputs = [decoder.head_inputs(index, rotations) for index in range(g.layers)]
        # a seat for padded rows too
        self._sampled = torch.zeros(max_batch_size + 1, dtype=torch.int64, device=device)
        self._max_batch_size = max_batch_size
        self._batch_sizes, self._row_counts = (
            _batch_sizes(max_batch_size),
            _row_counts(max_batch_size, max_step_tokens),
        )
        self._draft_rows = _DRAFT_ROWS if checks_drafts else ()
        # rows whose likeliest token no later step looks for
        self._nowhere = torch.full(
            (_DRAFT_ROWS[-1],), max_batch_size, dtype=torch.int32, device=device
        )
        self._max_seq_len = max_seq_len
        self._captured: dict[Shape, Captured] = {}
        self._memory: Any = None  # shared by all graphs
        self._staging = Staging()
        self._native = self._native_step() if device.type == "cpu" else None
        self._whole: GpuDecoder | None = None
        if self._captures and in_one_kernel is not False:
            self._whole = self._whole_step(everywhere=bool(in_one_kernel))

    @property
    def paths(self) -> dict[str, bool]:
        """How the model is computed, each with whether the device does so natively."""
        paths = self.decoder.paths
        if self._whole is not None:
            most = self._whole.most_tokens
            paths[f"one kernel for the layers, steps of {most} tokens at most"] = True
        return paths

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
        if any(chunk.drafts for chunk in chunks):
            return self._run_with_drafts(chunks)
        counts = [chunk.count for chunk in chunks]
        longest = max(chunk.start + chunk.count for chunk in chunks)
        rows, count = sum(counts), len(chunks)
        shape = self._shape(rows, count, longest) if self._captures else None
        if shape is not None:
            logits, tokens, hidden = self._replay(chunks, shape)
            assert hidden is not None
            return Output(logits[:count], tokens[:count], hidden[:rows])
        inputs = self._inputs(chunks, rows, count).to(self.decoder.device, non_blocking=True)
        if self._captures:
            self._staging.sent()
        if self._native:
            wants_hidden = any(map(_scores_prompt, chunks))
            return self._compute_natively(inputs, rows, count, hidden=wants_hidden)
        return self._compute(inputs, counts, longest)

    def _run_with_drafts(self, chunks: list[Chunk]) -> Output:
        """The same with logits inside the chunks that end in a draft."""
        if self.decoder.device.type == "cpu":
            # a token of its own each: what is computed for it is what it is without drafts
            return self.run([part for chunk in chunks for part in _apart(chunk)])
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.count
            rows += range(end - 1 - chunk.drafts, end)
        index = upload(rows, torch.int64, self.decoder.device)
        longest = max(chunk.start + chunk.count for chunk in chunks)
        shape = self._draft_shape(end, len(chunks), longest) if self._captures else None
        if shape is not None:
            logits, tokens, hidden = self._replay(chunks, shape)
            return Output(logits.index_select(0, index), tokens.index_select(0, index), hidden)
        whole = self.run([Chunk(chunk.request, chunk.start, chunk.count) for chunk in chunks])
        assert whole.hidden is not None
        logits = self.decoder.logits(whole.hidden.index_select(0, index))
        return Output(logits, reference.greedy(logits), whole.hidden)

    def _replay(self, chunks: list[Chunk], shape: Shape) -> Output:
        """The step in its shape's graph, with what is computed for padding."""
        captured = self._captured.get(shape) or self._capture(shape)
        packed = self._inputs(chunks, shape.rows, shape.sequences)
        if packed.numel() == captured.inputs.numel():
            captured.inputs.copy_(packed, non_blocking=True)
        else:  # columns of the tables that no chunk reaches are left as they were
            rest = captured.inputs.numel() - captured.tables.numel()
            captured.inputs[:rest].copy_(packed[:rest], non_blocking=True)
            used = packed[rest:].view(shape.sequences, -1)
            captured.tables[:, : used.shape[1]].copy_(used, non_blocking=True)
        self._staging.sent()
        captured.graph.replay()
        assert captured.output is not None
        return captured.output

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture every shape that a step may have, where there are graphs."""
        if not self._captures:
            return
        most = self._max_batch_size
        lengths = [False, True] if self._max_seq_len > LONG_CONTEXT else [False]
        for is_long in lengths:
            shapes = [Shape(size, size, is_long) for size in self._batch_sizes]
            shapes += [Shape(size, most, is_long) for size in self._row_counts]
            shapes += [Shape(size, size // 2, is_long, every=True) for size in self._draft_rows]
            for shape in shapes:
                if shape not in self._captured:
                    self._capture(shape)

    def rows(self, output: Output, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and likeliest tokens of some of the chunks."""
        if len(rows) == len(output.tokens):
            return output.logits, output.tokens
        index = upload(rows, torch.int64, self.decoder.device)
        return output.logits.index_select(0, index), output.tokens.index_select(0, index)

    def keep(self, requests: list[Request], tokens: Tensor) -> None:
        """Note tokens [len(requests)] that were sampled instead of the likeliest."""
        seats = [_seat(request) for request in requests]
        known = tokens.clamp(min=0)  # -1: there was none
        self._sampled.index_copy_(0, upload(seats, torch.int64, self.decoder.device), known)

    def _shape(self, rows: int, count: int, longest: int) -> Shape | None:
        """The smallest shape that is captured and holds a step; None: it runs without a graph."""
        is_long = longest >= LONG_CONTEXT
        if rows == count:
            size = next(size for size in self._batch_sizes if size >= count)
            return Shape(size, size, is_long)
        size = next((size for size in self._row_counts if size >= rows), 0)
        return Shape(size, self._max_batch_size, is_long) if size else None

    def _draft_shape(self, rows: int, count: int, longest: int) -> Shape | None:
        """The same of a step that checks drafts."""
        is_long = longest >= LONG_CONTEXT
        fits = (size for size in self._draft_rows if size >= rows and size // 2 >= count)
        size = next(fits, 0)
        return Shape(size, size // 2, is_long, every=True) if size else None

    def _inputs(self, chunks: list[Chunk], rows: int, sequences: int) -> Tensor:
        """All that a step reads, as one int32 tensor on the host: tokens, positions, slots and adapters
        [rows], contexts and seats [sequences], starts [sequences + 1], decodes [1], block tables
        [sequences, columns]: all, or of many those that are used. What is past the chunks is padding.

        A token that is not known yet is -1 - its request's seat.
        """
        count = len(chunks)
        columns = self.width
        if chunks and columns > _NARROW:
            used = max(len(chunk.request.blocks) for chunk in chunks)
            columns = min(columns, -(-used // _NARROW) * _NARROW)
        parts = [*self._parts(rows, sequences), sequences * columns]
        packed = self._stage(sum(parts))
        values: NDArray[np.int32] = packed.numpy()
        tokens, positions, slots, adapters, contexts, seats, starts, decodes, flat = np.split(
            values, np.cumsum(parts[:-1])
        )
        tables = flat.reshape(sequences, columns)
        ones = next((i for i, chunk in enumerate(chunks) if chunk.count > 1), count)
        decodes[0] = ones
        if chunks:
            np.stack([chunk.request.table[:columns] for chunk in chunks], out=tables[:count])
        at = [chunk.start for chunk in chunks[:ones]]
        positions[:ones] = at
        adapters[:ones] = [chunk.request.params.adapter for chunk in chunks[:ones]]
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
            adapters[row:end] = chunk.request.params.adapter
            slots[row:end] = tables[i, new // size] * size + new % size
            row = starts[i + 1] = end
        contexts[:count] = [chunk.start + chunk.count for chunk in chunks]
        seats[:count] = [_seat(chunk.request) for chunk in chunks]
        for part in (
            tokens[row:], positions[row:], adapters[row:], contexts[count:], tables[count:],
        ):  # fmt: skip
            part[:] = 0
        slots[row:] = self._num_blocks * size
        seats[count:] = len(self._sampled) - 1
        starts[count + 1 :] = row
        return packed

    def _stage(self, size: int) -> Tensor:
        """Room on the host for a step's inputs. With prompts alone nothing else waits for the device."""
        return self._staging.room(size) if self._captures else torch.empty(size, dtype=torch.int32)

    def _native_step(self) -> CpuDecoder | None:
        """The whole step as one native call, where the model and the machine allow it."""
        decoder = self.decoder
        weights = self._decode_weights()
        reason = cpu_decode.unsupported(weights, decoder.cache_dtype)
        if decoder.share.size > 1:
            reason = "the model is shared by several processes"
        if reason is not None:
            log.info("steps run operator by operator: %s", reason)
            return None
        rotations = [inputs.rotation for inputs in self._head_inputs]
        return CpuDecoder(weights, self._caches, rotations, self._block_size)

    def _whole_step(self, *, everywhere: bool) -> GpuDecoder | None:
        """The layers as one kernel. everywhere: for as many tokens as it can."""
        weights, rotation = self._decode_weights(), self._head_inputs[0].rotation
        reason = gpu_decode.unsupported(weights, self._caches, rotation)
        if self.decoder.share.size > 1:
            reason = "the model is shared by several processes"
        most = 0
        if reason is None:
            most = gpu_decode.MOST_TOKENS if everywhere else gpu_decode.faster_up_to(weights)
        if reason is None and not most:
            reason = "one kernel was not measured to be faster for this model and GPU"
        if reason is not None:
            log.info("steps of a few tokens run operator by operator: %s", reason)
            return None
        log.info("the layers of a step of %d tokens at most run in one kernel", most)
        return GpuDecoder(weights, self._caches, rotation, self._block_size, most)

    def _decode_weights(self) -> DecodeWeights:
        decoder = self.decoder
        return DecodeWeights(
            geometry=decoder.geometry, layers=decoder.layers, final_norm=decoder.final_norm,
            head=decoder.head,
        )  # fmt: skip

    def _compute_natively(
        self, inputs: Tensor, rows: int, sequences: int, *, hidden: bool
    ) -> Output:
        assert self._native is not None
        tokens, positions, slots, _, _, seats, starts, _, tables = self._split(
            inputs, rows, sequences
        )
        entering = self.decoder.embed(tokens, self._sampled)
        logits, states = self._native.step(
            entering, positions, slots, starts, tables, hidden=hidden
        )
        return Output(logits, greedy(logits, seats, self._sampled), states)

    def _parts(self, rows: int, sequences: int) -> list[int]:
        """Sizes of what `_inputs` joins, before the block tables."""
        return [*[rows] * 4, *[sequences] * 2, sequences + 1, 1]

    def _split(self, inputs: Tensor, rows: int, sequences: int) -> tuple[Tensor, ...]:
        """What `_inputs` joined."""
        parts = self._parts(rows, sequences)
        *found, tables = inputs.split([*parts, len(inputs) - sum(parts)])
        return *found, tables.view(sequences, -1)

    def _compute(
        self, inputs: Tensor, counts: list[int], longest: int, *, every: bool = False
    ) -> Output:
        rows, sequences = sum(counts), len(counts)
        tokens, positions, slots, adapters, contexts, seats, starts, decodes, tables = self._split(
            inputs, rows, sequences
        )
        decoder = self.decoder
        entering = decoder.embed(tokens, self._sampled)
        whole = self._whole
        if whole and rows == sequences <= whole.most_tokens and longest < LONG_CONTEXT:
            leaving = whole.step(entering, positions, slots, contexts, tables)
            hidden = decoder.normed(leaving)
            logits = decoder.logits(hidden)
            return Output(logits, greedy(logits, seats, self._sampled), hidden)
        batch = PagedBatch(
            tables, contexts, starts, positions, slots, decodes, counts, self._block_size, longest
        )

        def attend(index: int, qkv: Tensor) -> Any:
            return cached_attention(
                qkv, self._head_inputs[index], self._caches[index], batch,
                decoder.layers[index].out.takes,
            )  # fmt: skip

        with decoder.chosen.be(adapters):
            hidden = decoder.forward(entering, attend)
        if every:
            logits = decoder.logits(hidden)
            return Output(logits, greedy(logits, self._nowhere[:rows], self._sampled), hidden)
        last = hidden if rows == sequences else hidden[starts[1:].long() - 1]
        logits = decoder.logits(last)
        return Output(logits, greedy(logits, seats, self._sampled), hidden)

    def _capture(self, shape: Shape) -> Captured:
        rows, sequences, is_long, every = shape
        inputs = self._inputs([], rows, sequences).to(self.decoder.device)
        captured = Captured(inputs, self._split(inputs, rows, sequences)[-1])
        counts = [1] * sequences
        counts[-1] += rows - sequences
        work = (counts, LONG_CONTEXT if is_long else LONG_CONTEXT - 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and libraries start outside the capture
            self._compute(captured.inputs, *work, every=every)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(captured.graph, pool=self._memory):
            captured.output = self._compute(captured.inputs, *work, every=every)
        self._memory = captured.graph.pool()
        self._captured[shape] = captured
        return captured


def _scores_prompt(chunk: Chunk) -> bool:
    """Whether logits inside the prompt are asked for."""
    return chunk.start < len(chunk.request.prompt) and not chunk.request.may_reuse


def _apart(chunk: Chunk) -> list[Chunk]:
    """The tokens of a draft as chunks of their own, after what comes before them."""
    drafts = [Chunk(chunk.request, chunk.end + i, 1) for i in range(chunk.drafts)]
    return [Chunk(chunk.request, chunk.start, chunk.count - chunk.drafts), *drafts]


def _last_token(chunk: Chunk) -> int:
    """Of a chunk of one token; -1 - seat if its value is in flight."""
    if chunk.request.num_pending and chunk.start == chunk.request.num_known:
        return -1 - _seat(chunk.request)
    return chunk.request.tokens(chunk.start, 1)[0]


def _seat(request: Request) -> int:
    assert request.seat is not None
    return request.seat


def most_graphs(max_batch_size: int, max_step_tokens: int) -> int:
    """How many are captured, at most, without those of drafts."""
    shapes = len(_batch_sizes(max_batch_size)) + len(_row_counts(max_batch_size, max_step_tokens))
    return 2 * shapes  # of short contexts and of long ones


def _batch_sizes(largest: int) -> list[int]:
    """Batch sizes that are captured: a padded row costs little, a graph some memory."""
    sizes = [size for size in (1, 2, 4) if size < largest]
    return [*sizes, *range(8, largest, 8), largest]


def _row_counts(sequences: int, largest: int) -> list[int]:
    """Numbers of tokens with prompts among them that are captured: the smallest holds more than
    `sequences`, the last one `largest`, where that is not too many."""
    sizes = [16, 32, 64, *range(128, 1024, 64), *range(1024, 2048, 128), *range(2048, 4097, 256)]
    smaller = [size for size in sizes if size < largest]
    return [size for size in [*smaller, *sizes[len(smaller) :][:1]] if size > sequences]
