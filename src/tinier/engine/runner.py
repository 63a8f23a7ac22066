"""Computes the chunks of one step: token ids to logits, through the paged KV cache."""

import torch
from torch import Tensor

from tinier.engine.decoder import Decoder
from tinier.engine.scheduler import Chunk
from tinier.kernels.reference import PagedBatch, paged_attention


class Runner:
    """A decoder and its cache: for each layer keys and values [slots, kv_heads, head_dim]."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        self.decoder = decoder
        self._block_size = block_size
        g = decoder.geometry
        shape = (num_blocks * block_size, g.kv_heads, g.head_dim)

        def cache() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
                for _ in range(g.layers)
            ]

        self._keys, self._values = cache(), cache()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def run(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks and write their keys and values. Returns the logits after the last
        token of each, [len(chunks), vocab]."""
        device = self.decoder.device
        tokens = [t for c in chunks for t in c.request.tokens(c.start, c.count)]
        positions = [p for c in chunks for p in range(c.start, c.start + c.count)]
        tables = [self._slots(c).to(device) for c in chunks]
        batch = PagedBatch(tables, [c.count for c in chunks])
        new_slots = torch.cat([t[-c.count :] for t, c in zip(tables, chunks, strict=True)])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[new_slots] = k
            values[new_slots] = v
            return paged_attention(q, keys, values, batch, self.decoder.geometry.windows[layer])

        hidden = self.decoder.forward(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), attend
        )
        last = torch.tensor(batch.counts, device=device).cumsum(0) - 1
        return self.decoder.logits(hidden[last])

    def _slots(self, chunk: Chunk) -> Tensor:
        """Cache slots of a request's tokens up to the end of the chunk, in order."""
        blocks = torch.tensor(chunk.request.blocks).unsqueeze(1) * self._block_size
        slots = blocks + torch.arange(self._block_size)
        return slots.flatten()[: chunk.start + chunk.count]
