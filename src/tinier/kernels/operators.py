"""Which way the decoder's small operators run: Triton on a GPU, plain torch elsewhere.

T: tokens of all sequences, packed one after the other. `takes` is how the next linear layer wants its
input (Linear.takes); torch leaves the rounding to that layer. What a linear layer hands on may be parts to
be summed, [S, T, N] (skinny.py).
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.kernels import reference
from tinier.kernels.reference import Cache, HeadInputs, PagedBatch
from tinier.numerics import Quantized

_TRITON = find_spec("triton")
# a folder of that name in the current directory is found too, and is no package
HAS_TRITON = _TRITON is not None and _TRITON.origin is not None
if HAS_TRITON:
    from tinier.kernels import attention, fused


def uses_triton(device: torch.device) -> bool:
    """Whether the operators on this device are the Triton ones."""
    return HAS_TRITON and device.type == "cuda"


def embed(tokens: Tensor, sampled: Tensor, table: Tensor) -> Tensor:
    """Rows of table [vocab, hidden] for tokens [T]; token -1 - i stands for sampled[i]."""
    if uses_triton(table.device):
        return fused.embed(tokens, sampled, table)
    return F.embedding(reference.known_tokens(tokens, sampled), table)


def greedy(logits: Tensor, seats: Tensor, sampled: Tensor) -> Tensor:
    """The likeliest token of each row of logits [B, vocab], [B] int64; written to sampled[seats] too.

    -1 (sampled: 0) for a row that has NaN or Inf.
    """
    if uses_triton(logits.device):
        return fused.greedy(logits, seats, sampled)
    tokens = reference.greedy(logits)
    sampled.index_copy_(0, seats.long(), tokens.clamp(min=0))
    return tokens


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, takes: str | None = None
) -> tuple[Tensor, Tensor | Quantized]:
    """x + delta [T, hidden], and the norm of it."""
    if uses_triton(x.device):
        return fused.add_rms_norm(x, delta, weight, eps, takes)
    if delta is not None:
        x = x + delta
    return x, reference.rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor, dtype: torch.dtype, takes: str | None = None) -> Tensor | Quantized:
    """silu(gate) · up of a fused [T, 2·intermediate], in dtype."""
    if uses_triton(gate_up.device):
        return fused.silu_mul(gate_up, dtype, takes)
    return reference.silu_mul(gate_up)


def cached_attention(
    qkv: Tensor, inputs: HeadInputs, cache: Cache, batch: PagedBatch, takes: str | None = None
) -> Tensor | Quantized:
    """Norm and RoPE of q and k, k and v into the cache, attention over it.

    qkv: [T, (H + 2K)·D]. Returns [T, H·D].
    """
    size = cache.keys.shape[-1]
    if uses_triton(qkv.device) and size & (size - 1) == 0:
        return attention.cached_attention(qkv, inputs, cache, batch, takes)
    return reference.cached_attention(qkv, inputs, cache, batch)
