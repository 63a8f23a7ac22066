"""Memory of several GPUs of one host that all of them can write to, for what few tokens exchange.

A library's all-reduce is a kernel of its own, twice a layer, and then a norm reads what it wrote. Here
the norm itself makes the sum (fused.py): the program of a token writes its part into the memory of all
others, waits until theirs have come into its own, and adds all in the order of the ranks, so that every
process has the same bits. The parts of the logits are put side by side in the same way. Every part goes to
every process, so it is for few processes and few tokens.

Nothing tells that a number has come but the number: a place holds -0.0 until then, which is never sent, and
again once it was read (as in NCCL's LL protocol and TensorRT-LLM's Lamport all-reduce). Consecutive
exchanges take two sets of places in turn: who writes to one of them again has got the parts of the exchange
in between, which all others sent after they had read the one before.
"""

import itertools
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinier.kernels.machine import machine_of

log = logging.getLogger(__name__)

MOST_PEER_TOKENS = 256
_MOST_HIDDEN = 8192
_LOGITS_BYTES = 32 << 20  # 128 rows of 128,000 in bf16
EMPTY = -(2**31)
"""A place where nothing is: the smallest int32, which as a float32 is -0.0"""


class Peers:
    """This process's view of the memory: places of int32, for sums [turn, from, token, hidden] and behind
    them for logits [turn, from, …]."""

    def __init__(self, rank: int, size: int, addresses: Tensor, memory: object) -> None:
        """addresses: [size] int64, where each process's memory begins, as this one's GPU sees it. memory:
        what owns it."""
        self.rank, self.size, self.addresses = rank, size, addresses
        self._memory = memory
        self._turns = itertools.cycle((0, 1))

    def fits_sum(self, tokens: int, hidden: int) -> bool:
        """Whether there is room for a sum over [tokens, hidden]."""
        return tokens <= MOST_PEER_TOKENS and hidden <= _MOST_HIDDEN

    def fits_logits(self, part: Tensor) -> bool:
        """Whether there is room for a part of the logits of each process."""
        whole = part.nbytes * self.size
        return whole <= _LOGITS_BYTES and part.shape[-1] * part.itemsize % 4 == 0

    def next_places(self) -> tuple[int, int]:
        """Where the next parts of logits go, by turns: the place of the first process's, and from one
        process's to the next one's."""
        room = _LOGITS_BYTES // 4 // self.size
        return _sum_places(self.size) + next(self._turns) * self.size * room, room


def _sum_places(size: int) -> int:
    return 2 * size * MOST_PEER_TOKENS * _MOST_HIDDEN


def open_peers(rank: int, size: int, device: torch.device, group: Any) -> Peers | None:
    """Memory that all processes of a torch group can read; all must call it. None where their GPUs cannot
    read each other's memory, or do not run Triton's kernels."""
    if not machine_of(device).runs_triton:
        return None
    import torch.distributed._symmetric_memory as symmetric

    places = _sum_places(size) + 2 * _LOGITS_BYTES // 4
    handle = None
    try:
        memory = symmetric.empty(places, dtype=torch.int32, device=device)
        handle = symmetric.rendezvous(memory.fill_(EMPTY), group)
    except RuntimeError as error:
        log.warning("sums over processes go through NCCL: %s", str(error).splitlines()[0])
    # all or none
    found = torch.tensor(int(handle is not None))
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    if handle is None or not found:
        return None
    torch.cuda.synchronize(device)  # all places are empty
    dist.all_reduce(found, group=group)
    starts = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    return Peers(rank, size, starts, (memory, handle))
