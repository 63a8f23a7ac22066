"""Plain torch operators of the decoder, on any device. The faster versions are tested against these.

T: tokens of all sequences, packed one after the other. H: query heads. K: KV heads. D: head size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside.

    arXiv 1910.07467. Rounds to x's type before the weight multiplies, as transformers does.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, arXiv 2104.09864, halves rotated against each other. x: [T, heads, D]; cos, sin: [T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of a fused [T, 2·intermediate]. arXiv 2002.05202."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class PagedBatch(NamedTuple):
    """Which tokens of which sequences one forward pass computes, and where their cache is."""

    tables: list[Tensor]
    """For each sequence its cache slots in order, [context] int64; context counts the new tokens."""
    counts: list[int]
    """For each sequence how many new tokens: its last `count` positions."""


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, window: int | None
) -> Tensor:
    """Causal attention of new tokens over their sequences' cached keys and values.

    q: [T, H, D]; k_cache, v_cache: [slots, K, D], the new tokens' entries already written.
    Returns [T, H, D]. Each token sees at most the last `window` positions, itself included.
    """
    if all(count == 1 for count in batch.counts):
        return _decode_attention(q, k_cache, v_cache, batch.tables, window)
    outputs = []
    start = 0
    for slots, count in zip(batch.tables, batch.counts, strict=True):
        context = slots.numel()
        mask = _causal_mask(context, count, window, q.device)
        out = F.scaled_dot_product_attention(
            q[start : start + count].transpose(0, 1).unsqueeze(0),  # [1, H, count, D]
            k_cache[slots].transpose(0, 1).unsqueeze(0),  # [1, K, context, D]
            v_cache[slots].transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            enable_gqa=True,
        )
        outputs.append(out.squeeze(0).transpose(0, 1))  # [count, H, D]
        start += count
    return torch.cat(outputs)


def _causal_mask(
    context: int, count: int, window: int | None, device: torch.device
) -> Tensor | None:
    """[count, context] True where visible; None where plain causal attention says the same."""
    if count == context and (window is None or context <= window):
        return None
    query = torch.arange(context - count, context, device=device).unsqueeze(1)
    key = torch.arange(context, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: list[Tensor], window: int | None
) -> Tensor:
    """One new token per sequence: pad the contexts to one length and attend in one call."""
    lengths = torch.tensor([t.numel() for t in tables], device=q.device)
    slots = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)  # [B, longest]
    key = torch.arange(slots.shape[1], device=q.device)
    visible = key < lengths.unsqueeze(1)
    if window is not None:
        visible &= key >= (lengths - window).unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),  # [B, H, 1, D]
        k_cache[slots].transpose(1, 2),  # [B, K, longest, D]
        v_cache[slots].transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        enable_gqa=True,
    )
    return out.squeeze(2)
