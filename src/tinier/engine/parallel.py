"""Tensor parallelism: each process holds a share of every layer's heads and neurons.

q, k, v, gate and up are cut by rows, o and down by columns (arXiv 1909.08053), the head by rows of the
vocabulary. A layer's two results are summed over the processes, the logits put side by side. Every process
runs the same engine on the same requests (crew.py), so nothing else is exchanged.

What few tokens exchange goes through memory that the GPUs share (kernels/peers.py), their sums inside the
norm that reads them; what many do, and where GPUs cannot reach each other's memory, through NCCL.

Activations that are rounded with a scale per token get one for each process's share of o's and down's
inputs: a finer rounding than that on one device.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinier.errors import InputError
from tinier.families import Geometry
from tinier.kernels import Peers, StoredLinear, open_peers, side_by_side
from tinier.numerics import Quantized
from tinier.ranks import meet


@dataclass(frozen=True, slots=True)
class Share:
    """What this process holds."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """torch's, of the processes"""
    peers: Peers | None = None
    """Memory of all of them, where GPUs reach each other's"""

    def geometry(self, whole: Geometry) -> Geometry:
        """The sizes of this process's part. Raises InputError where they do not divide."""
        for name in ("heads", "kv_heads", "intermediate"):
            if getattr(whole, name) % self.size:
                raise InputError(
                    f"tensor_parallel={self.size} does not divide the model's {name} "
                    f"({getattr(whole, name)}). Use a divisor of it."
                )
        return replace(
            whole, heads=whole.heads // self.size, kv_heads=whole.kv_heads // self.size,
            intermediate=whole.intermediate // self.size,
        )  # fmt: skip

    def part(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor."""
        return tensor if self.size == 1 else self._part(tensor, 0)

    def rows(self, stored: StoredLinear, parts: list[int] | None = None) -> StoredLinear:
        """This process's outputs of a layer: its share of each of the parts, of so many rows, that lie one
        after the other in it."""
        if self.size == 1:
            return stored
        bias = None if stored.bias is None else self._part(stored.bias, 0, parts)
        return stored._replace(weight=self._cut(stored.weight, 0, parts), bias=bias)

    def columns(self, stored: StoredLinear) -> StoredLinear:
        """A layer over this process's inputs; the first one adds the bias."""
        if self.size == 1:
            return stored
        bias = stored.bias if self.rank == 0 else None
        return stored._replace(weight=self._cut(stored.weight, 1), bias=bias)

    def sum(self, value: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def side_by_side(self, value: Tensor) -> Tensor:
        """The processes' [n, part] as [n, whole]."""
        if self.size == 1:
            return value
        value = value.contiguous()
        if self.peers is not None and self.peers.fits_logits(value):
            return side_by_side(value, self.peers)
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group=self.group)
        return torch.cat(parts, dim=-1)

    def least(self, value: int) -> int:
        """Smallest over the processes, which must plan alike."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return int(tensor)

    def _cut(
        self, weight: Tensor | Quantized, dim: int, parts: list[int] | None = None
    ) -> Tensor | Quantized:
        if isinstance(weight, Tensor):
            return self._part(weight, dim, parts)
        zero = weight.zero_point
        return weight._replace(
            codes=self._part(weight.codes, dim, parts),
            scale=self._part(weight.scale, dim, parts),
            zero_point=None if zero is None else self._part(zero, dim, parts),
        )

    def _part(self, tensor: Tensor, dim: int, parts: list[int] | None = None) -> Tensor:
        length = tensor.shape[dim]
        if length == 1:  # one scale for all
            return tensor
        pieces = [tensor]
        if parts is not None:  # a scale may be that of several rows
            pieces = list(tensor.split([part * length // sum(parts) for part in parts], dim))
        for piece in pieces:
            if piece.shape[dim] % self.size:
                raise InputError(
                    f"tensor_parallel={self.size} does not divide the {piece.shape[dim]} groups or rows of "
                    "a layer. Use a smaller one."
                )
        own = [piece.chunk(self.size, dim)[self.rank] for piece in pieces]
        return torch.cat(own, dim).contiguous()


ALONE = Share()


def share_of(rank: int, size: int, store: Any, device: torch.device) -> Share:
    """Meet the other processes, which know the same store, and open the memory that all can read."""
    group = meet(rank, size, store, device)
    peers = open_peers(rank, size, device, group) if device.type == "cuda" else None
    return Share(rank, size, group, peers)
