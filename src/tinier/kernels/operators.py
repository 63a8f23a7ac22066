"""Which way the decoder's small operators run: Triton on a GPU, plain torch elsewhere.

T: tokens of all sequences, packed one after the other. `takes` is how the next linear layer wants its
input (Linear.takes); torch leaves the rounding to that layer. What a linear layer hands on may be parts to
be summed, [S, T, N] (skinny.py).
"""

import torch
from torch import Tensor

from tinier.kernels import reference
from tinier.kernels.machine import HAS_TRITON, machine_of
from tinier.kernels.peers import Peers
from tinier.kernels.reference import Cache, HeadInputs, PagedBatch
from tinier.kernels.table import Table
from tinier.numerics import Quantized

if HAS_TRITON:
    from tinier.kernels import attention, draws, fused


def uses_triton(device: torch.device) -> bool:
    """Whether the operators on this device are the Triton ones."""
    return machine_of(device).runs_triton


def captures(device: torch.device, cache_dtype: torch.dtype) -> bool:
    """Whether a step is the same kernels whatever the batch is, so that it can be a CUDA graph: not where
    attention runs in plain torch, which looks at the batch's lengths."""
    return machine_of(device).caches(cache_dtype)


def embed(tokens: Tensor, sampled: Tensor, table: Table, times: float = 1.0) -> Tensor:
    """Rows of an embedding, times a number, for tokens [T]; token -1 - i stands for sampled[i]."""
    if uses_triton(table.codes.device):
        return fused.embed(tokens, sampled, table, times)
    rows = table.rows(reference.known_tokens(tokens, sampled))
    return rows if times == 1 else rows * times


def greedy(logits: Tensor, seats: Tensor, sampled: Tensor) -> Tensor:
    """The likeliest token of each row of logits [B, vocab], [B] int64; written to sampled[seats] too.

    -1 (sampled: 0) for a row that has NaN or Inf.
    """
    if uses_triton(logits.device):
        return draws.greedy(logits, seats, sampled)
    tokens = reference.greedy(logits)
    sampled.index_copy_(0, seats.long(), tokens.clamp(min=0))
    return tokens


def drawn(logits: Tensor, temperatures: Tensor, row_keys: Tensor, allowed: Tensor | None) -> Tensor:
    """Tokens by temperature alone, where there is a kernel for it (`uses_triton`): draws.draw."""
    return draws.draw(logits, temperatures, row_keys, allowed)


def gumbel(row_keys: Tensor, vocab: int) -> Tensor:
    """The noise that `drawn` adds, [R, vocab]."""
    return draws.noise(row_keys, vocab)


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float, takes: str | None = None,
    times: float = 1.0, between: Tensor | None = None, peers: Peers | None = None, turn: int = 0,
) -> tuple[Tensor, Tensor | Quantized]:  # fmt: skip
    """x + times · delta [T, hidden], and the norm of it; weight None: itself. between: weight of a norm
    that delta goes through first. peers: of GPUs, where delta is to be summed over the processes too; turn:
    0 and 1 by turns."""
    if uses_triton(x.device):
        return fused.add_rms_norm(x, delta, weight, eps, takes, times, between, peers, turn)
    if delta is not None and between is not None:
        delta = reference.rms_norm(delta, between, eps)
    if delta is not None:
        x = x + (delta if times == 1 else delta * times)
    return x, x if weight is None else reference.rms_norm(x, weight, eps)


def side_by_side(part: Tensor, peers: Peers) -> Tensor:
    """[T, whole] of the processes' [T, N], on GPUs that reach each other's memory."""
    return fused.side_by_side(part, peers)


def norm_all_heads(
    qkv: Tensor, norms: tuple[Tensor, Tensor], eps: float, dtype: torch.dtype
) -> Tensor:
    """q and k of a fused [T, (H + 2K)·D] normed, each over all its heads' channels together, in dtype."""
    if uses_triton(qkv.device):
        return fused.norm_all_heads(qkv, norms, eps, dtype)
    return reference.norm_all_heads(qkv, norms, eps)


def gated(
    gate_up: Tensor, dtype: torch.dtype, takes: str | None = None, activation: str = "silu"
) -> Tensor | Quantized:
    """silu(gate) · up, or gelu_tanh, of a fused [T, 2·intermediate], in dtype."""
    if uses_triton(gate_up.device):
        return fused.gated(gate_up, dtype, takes, activation)
    return reference.gated(gate_up, activation)


def cached_attention(
    qkv: Tensor, inputs: HeadInputs, cache: Cache, batch: PagedBatch, takes: str | None = None
) -> Tensor | Quantized:
    """Norm and RoPE of q and k, k and v into the cache, attention over it.

    qkv: [T, (H + 2K)·D]. Returns [T, H·D].
    """
    if machine_of(qkv.device).caches(cache.keys.dtype):
        return attention.cached_attention(qkv, inputs, cache, batch, takes)
    return reference.cached_attention(qkv, inputs, cache, batch)
