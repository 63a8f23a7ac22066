"""Processes that work together, one for each device: which one this is, and sums over all of them.

`join_ranks` is for those that torchrun started (quantize, distill): each computes its share of the windows,
and all see the same sums. `meet` is for those that tinier started itself (engine/crew.py). Where there is
one process everything here does nothing, so callers need no second path.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinier.errors import InputError

# one process writes text, measures sensitivities or fills the teacher's store while the others wait for it,
# for hours with large models. torchrun, or whoever started them, ends them all when one of them ends
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Ranks:
    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that decides and writes."""
        return self.rank == 0

    def share(self, windows: Tensor, batch: int) -> Tensor:
        """This rank's windows [n, length]: whole batches, in order, so that sums over batches are
        over the same batches however many ranks there are."""
        batches = windows.split(batch)
        if len(batches) < self.size:
            raise InputError(
                f"{len(windows)} windows are {len(batches)} batches, too few for {self.size} "
                "processes. Use more --windows, or fewer processes."
            )
        bounds = [round(i * len(batches) / self.size) for i in range(self.size + 1)]
        return torch.cat(batches[bounds[self.rank] : bounds[self.rank + 1]])

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def max_(self, value: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The ranks' tensors one after the other along the first dimension."""
        if self.size == 1:
            return value
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(value)]))
        most = max(int(count) for count in counts)
        own = value.new_zeros(most, *value.shape[1:])
        own[: len(value)] = value
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat([p[: int(count)] for p, count in zip(parts, counts, strict=True)])

    def merge(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The tensors of all ranks at the first one, on its device. Empty at the others.

        device: this process's own."""
        merged = {name: tensor.to(device) for name, tensor in tensors.items() if self.writes}
        for rank, found in enumerate(self.collect(_described(tensors))):
            for name, (shape, dtype) in found.items() if rank else ():
                merged[name] = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(_as_bytes(merged[name], device), rank)
        if not self.writes:
            for tensor in tensors.values():
                dist.send(_as_bytes(tensor, device), 0)
        return merged

    def spread(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The first rank's tensors at all of them, on each one's device."""
        if self.size == 1:
            return tensors
        described = [_described(tensors)]
        dist.broadcast_object_list(described)
        found = {}
        for name, (shape, dtype) in described[0].items():
            if self.writes:
                found[name] = tensors[name].to(device).contiguous()
            else:
                found[name] = torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(_as_bytes(found[name], device), 0)
        return found

    def collect(self, value: Any) -> list[Any]:
        """What each rank has, at the first one; no tensors. Empty at the others."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        dist.gather_object(value, parts if self.writes else None)
        return parts if self.writes else []

    def wait(self) -> None:
        """Return when every rank is here. A GPU is left alone meanwhile."""
        self.max_(torch.zeros(()))


ALONE = Ranks()


def _described(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor as every backend can send it, whatever its type; a view of one that is contiguous and there.

    Both sides must have it on the same kind of device: one that sends from the host and one that receives
    on a GPU use different backends, and wait for each other for ever.
    """
    return tensor.to(device).contiguous().view(-1).view(torch.uint8)


def join_ranks(device: torch.device) -> Ranks:
    """This process's place among those that torchrun started; alone without torchrun.

    device: this process's own, as `pick_device` gives it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), timeout=_PATIENCE)
    return Ranks(dist.get_rank(), size)


def meet(rank: int, size: int, store: Any, device: torch.device) -> Any:
    """Join the processes that know `store`, this one as number `rank` of `size`; returns torch's group."""
    dist.init_process_group(
        _backend(device), store=store, rank=rank, world_size=size, timeout=_PATIENCE
    )
    group = dist.group.WORLD
    # not torch's default group: compressed-tensors, Accelerate and others look for one, and would wait for
    # processes that know nothing of what they do
    dist.distributed_c10d._update_default_pg(None)
    return group


def _backend(device: torch.device) -> str:
    # gloo moves what is on the host: decisions, samples, and the waiting for each other
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
