"""Memory of several GPUs of one host that all of them can read, for sums of few tokens over processes.

A library's all-reduce is a kernel of its own, twice a layer, and then a norm reads what it wrote. Here
the norm itself makes the sum (fused.py): the program of a token writes its own part where the others can
read it, tells them, waits for theirs, and adds all in the order of the ranks, so that every process has
the same bits. It reads from each of the others once, so it is for few processes and few tokens.

There are two places to write, which consecutive sums take in turn. Who writes to one of them again has been
told of the sum in between by all others, and so that they have read it.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinier.kernels.machine import machine_of

log = logging.getLogger(__name__)

MOST_PEER_TOKENS = 256
_BYTES = 16 << 20  # room for 256 tokens of 8,192 numbers in float32, twice


@dataclass(frozen=True, slots=True)
class Peers:
    rank: int
    size: int
    addresses: Tensor
    """[size] int64: where each process's memory begins, as this one's GPU sees it"""
    flags: Tensor
    """[size] int64: the same of its flags, one int32 for each place, token and process"""
    memory: object
    """What owns it"""

    def holds(self, tokens: int, hidden: int) -> bool:
        """Whether a sum over [tokens, hidden] fits."""
        return tokens <= MOST_PEER_TOKENS and 2 * tokens * hidden * 4 <= _BYTES


def open_peers(rank: int, size: int, device: torch.device, group: Any) -> Peers | None:
    """Memory that all processes of a torch group can read; all must call it. None where their GPUs cannot
    read each other's memory, or do not run Triton's kernels."""
    if not machine_of(device).runs_triton:
        return None
    import torch.distributed._symmetric_memory as symmetric

    flag_bytes = 2 * MOST_PEER_TOKENS * size * 4
    handle = None
    try:
        memory = symmetric.empty(_BYTES + flag_bytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(memory.zero_(), group)
    except RuntimeError as error:
        log.warning("sums over processes go through NCCL: %s", str(error).splitlines()[0])
    # all or none
    found = torch.tensor(int(handle is not None))
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    if handle is None or not found:
        return None
    torch.cuda.synchronize(device)  # the flags are zero
    dist.all_reduce(found, group=group)
    starts = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    return Peers(rank, size, starts, starts + _BYTES, (memory, handle))
