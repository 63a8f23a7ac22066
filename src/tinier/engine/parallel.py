"""Tensor parallelism: each process holds a share of every layer's heads and neurons.

Start at `join`. q, k, v, gate and up are cut by rows, o and down by columns (arXiv 1909.08053), the head by
rows of the vocabulary. A layer's two results are summed over the processes, the logits put side by side.
Every process runs the same engine on the same requests, so nothing else is exchanged.

Activations that are rounded with a scale per token get one for each process's share of o's and down's
inputs: a finer rounding than that on one device.
"""

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tinier.errors import InputError
from tinier.families import Geometry
from tinier.kernels import StoredLinear
from tinier.numerics import Quantized


@dataclass(frozen=True, slots=True)
class Share:
    """What this process holds."""

    rank: int = 0
    size: int = 1

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

    def rows(self, stored: StoredLinear) -> StoredLinear:
        """This process's outputs of a layer."""
        if self.size == 1:
            return stored
        bias = None if stored.bias is None else self._part(stored.bias, 0)
        return stored._replace(weight=self._cut(stored.weight, 0), bias=bias)

    def columns(self, stored: StoredLinear) -> StoredLinear:
        """A layer over this process's inputs; the first one adds the bias."""
        if self.size == 1:
            return stored
        bias = stored.bias if self.rank == 0 else None
        return stored._replace(weight=self._cut(stored.weight, 1), bias=bias)

    def sum(self, value: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def side_by_side(self, value: Tensor) -> Tensor:
        """The processes' [n, part] as [n, whole]."""
        if self.size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts, dim=-1)

    def least(self, value: int) -> int:
        """Smallest over the processes."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def _cut(self, weight: Tensor | Quantized, dim: int) -> Tensor | Quantized:
        if isinstance(weight, Tensor):
            return self._part(weight, dim)
        zero = weight.zero_point
        return weight._replace(
            codes=self._part(weight.codes, dim),
            scale=self._part(weight.scale, dim),
            zero_point=None if zero is None else self._part(zero, dim),
        )

    def _part(self, tensor: Tensor, dim: int) -> Tensor:
        length = tensor.shape[dim]
        if length == 1:  # one scale for all
            return tensor
        if length % self.size:
            raise InputError(
                f"tensor_parallel={self.size} does not divide the {length} groups or rows of a layer."
            )
        part = length // self.size
        return tensor.narrow(dim, self.rank * part, part).contiguous()


ALONE = Share()


def join(tensor_parallel: int, device: torch.device) -> Share:
    """Meet the other processes; on GPUs this one takes its own.

    Raises InputError unless torchrun started `tensor_parallel` processes.
    """
    if tensor_parallel == 1:
        return ALONE
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != tensor_parallel:
        raise InputError(
            f"tensor_parallel={tensor_parallel} with {started} process{'es' * (started > 1)}. "
            f"Start as many: torchrun --nproc-per-node {tensor_parallel} -m tinier …"
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Share(dist.get_rank(), tensor_parallel)
