"""Which way the decoder's small operators run: Triton on a GPU, plain torch elsewhere.

T: tokens of all sequences, packed one after the other. `takes` is how the next linear layer wants its
input (Linear.takes); torch leaves the rounding to that layer.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from tinier.kernels import reference
from tinier.kernels.reference import PagedBatch
from tinier.numerics import Quantized

_HAS_TRITON = find_spec("triton") is not None
if _HAS_TRITON:
    from tinier.kernels import attention, fused

Rotation = tuple[Tensor, Tensor]
"""cos and sin of every position, each [positions, D]"""


def uses_triton(device: torch.device) -> bool:
    """Whether the operators on this device are the Triton ones."""
    return _HAS_TRITON and device.type == "cuda"


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, takes: str | None = None
) -> tuple[Tensor, Tensor | Quantized]:
    """x + delta [T, hidden], and the norm of it."""
    if uses_triton(x.device):
        return fused.add_rms_norm(x, delta, weight, eps, takes)
    if delta is not None:
        x = x + delta
    return x, reference.rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor, takes: str | None = None) -> Tensor | Quantized:
    """silu(gate) · up of a fused [T, 2·intermediate]."""
    if uses_triton(gate_up.device):
        return fused.silu_mul(gate_up, takes)
    return reference.silu_mul(gate_up)


def cached_attention(
    qkv: Tensor, rotation: Rotation, norms: tuple[Tensor, Tensor] | None, eps: float, heads: int,
    keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None, batch: PagedBatch,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Norm and RoPE of q and k, k and v into the cache, attention over it.

    qkv: [T, (H + 2K)·D]. norms: weights [D] of q's and k's norm, if any. keys, values: [slots, K, D],
    codes where `scales` (of keys and of values, [1]) are given. window: positions each token sees, itself
    included; None: all. Returns [T, H·D].
    """
    kv_heads, size = keys.shape[1:]
    if uses_triton(qkv.device) and size & (size - 1) == 0:
        q = fused.rotate_and_store(
            qkv, rotation, batch.positions, batch.slots, norms, eps, heads, keys, values, scales
        )
        return attention.paged_attention(q, keys, values, batch, window, scales).flatten(1)
    positions, slots = batch.positions.long(), batch.slots.long()
    turns = (rotation[0][positions].unsqueeze(1), rotation[1][positions].unsqueeze(1))
    q, k, v = reference.split_heads(qkv, turns, norms, eps, heads, kv_heads)
    k_scale, v_scale = scales or (None, None)
    reference.store(keys, slots, k, k_scale)
    reference.store(values, slots, v, v_scale)
    return reference.paged_attention(q, keys, values, batch, window, scales).flatten(1)
