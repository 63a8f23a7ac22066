"""Computes the chunks of one step: token ids to logits, through the paged KV cache.

A step of one token per sequence is the same few hundred kernels every time, so on a GPU it is captured
as a CUDA graph for each of a few batch sizes; a batch is padded to the next of them.
"""

from typing import Any

import torch
from torch import Tensor

from tinier.engine.decoder import Decoder
from tinier.engine.scheduler import Chunk
from tinier.kernels import PagedBatch, cached_attention, uses_triton


class Captured:
    """One batch size's graph with the buffers that it reads and writes."""

    def __init__(self, inputs: Tensor, size: int) -> None:
        self.inputs = inputs
        self.size = size
        self.graph = torch.cuda.CUDAGraph()
        self.logits: Tensor | None = None


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
        self._width = -(-max_seq_len // block_size)
        g = decoder.geometry
        # one block past those that are handed out: where padded rows write
        shape = ((num_blocks + 1) * block_size, g.kv_heads, g.head_dim)

        def cache() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=decoder.cache_dtype, device=decoder.device)
                for _ in range(g.layers)
            ]

        self._keys, self._values = cache(), cache()
        self._rotation = decoder.rotation(torch.arange(max_seq_len, device=decoder.device))
        self._captures = uses_triton(decoder.device)
        self._sizes = _batch_sizes(max_batch_size)
        self._captured: dict[int, Captured] = {}
        self._memory: Any = None  # shared by all graphs

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks and write their keys and values. Returns the logits after the last
        token of each, [len(chunks), vocab]; they hold until the next call."""
        counts = [chunk.count for chunk in chunks]
        if self._captures and max(counts) == 1:
            size = next(size for size in self._sizes if size >= len(chunks))
            captured = self._captured.get(size) or self._capture(size)
            captured.inputs.copy_(self._inputs(chunks, size), non_blocking=True)
            captured.graph.replay()
            assert captured.logits is not None
            return captured.logits[: len(chunks)]
        inputs = self._inputs(chunks, sum(counts)).to(self.decoder.device, non_blocking=True)
        return self._compute(inputs, counts, sum(counts))

    def _inputs(self, chunks: list[Chunk], rows: int) -> Tensor:
        """All that a step reads, as one int32 tensor on the host: tokens, positions and slots [rows],
        contexts [B], starts [B + 1], block tables [B, width]. Rows past the chunks' are padding."""
        count = len(chunks)
        sequences = rows if all(chunk.count == 1 for chunk in chunks) else count
        packed = torch.zeros(
            3 * rows + 2 * sequences + 1 + sequences * self._width, dtype=torch.int32,
            pin_memory=self._captures,
        )  # fmt: skip
        values = packed.numpy()
        tokens, positions, slots = (values[i * rows : (i + 1) * rows] for i in range(3))
        slots[:] = self._num_blocks * self._block_size
        contexts = values[3 * rows : 3 * rows + sequences]
        starts = values[3 * rows + sequences : 3 * rows + 2 * sequences + 1]
        tables = values[3 * rows + 2 * sequences + 1 :].reshape(sequences, self._width)
        row = 0
        for i, chunk in enumerate(chunks):
            request, end = chunk.request, row + chunk.count
            tables[i, : len(request.blocks)] = request.blocks
            tokens[row:end] = request.tokens(chunk.start, chunk.count)
            contexts[i] = chunk.start + chunk.count
            positions[row:end] = range(chunk.start, chunk.start + chunk.count)
            at = positions[row:end]
            slots[row:end] = (
                tables[i, at // self._block_size] * self._block_size + at % self._block_size
            )
            row = starts[i + 1] = end
        starts[count + 1 :] = range(row + 1, row + 1 + sequences - count)
        return packed

    def _compute(self, inputs: Tensor, counts: list[int], rows: int) -> Tensor:
        sequences = len(counts)
        tokens, positions, slots, contexts, starts, tables = inputs.split(
            [rows, rows, rows, sequences, sequences + 1, sequences * self._width]
        )
        batch = PagedBatch(
            tables.view(sequences, self._width), contexts, starts, positions, slots, counts,
            self._block_size,
        )  # fmt: skip
        g, layers = self.decoder.geometry, self.decoder.layers

        def attend(index: int, qkv: Tensor) -> Tensor:
            layer = layers[index]
            return cached_attention(
                qkv, self._rotation, layer.head_norms, g.norm_eps, g.heads, self._keys[index],
                self._values[index], layer.kv_scales, batch, g.windows[index],
            )  # fmt: skip

        hidden = self.decoder.forward(tokens, attend)
        if rows > sequences:
            hidden = hidden[starts[1:].long() - 1]
        return self.decoder.logits(hidden)

    def _capture(self, size: int) -> Captured:
        """The graph of one token for each of `size` sequences."""
        captured = Captured(self._inputs([], size).to(self.decoder.device), size)
        counts = [1] * size
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and libraries start outside the capture
            self._compute(captured.inputs, counts, size)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(captured.graph, pool=self._memory):
            captured.logits = self._compute(captured.inputs, counts, size)
        self._memory = captured.graph.pool()
        self._captured[size] = captured
        return captured


def _batch_sizes(largest: int) -> list[int]:
    """Batch sizes that are captured: a padded row costs little, a graph some memory."""
    sizes = [size for size in (1, 2, 4) if size < largest]
    return [*sizes, *range(8, largest, 8), largest]
