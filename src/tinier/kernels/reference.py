"""Plain torch operators of the decoder, on any device. The faster versions are tested against these.

T: tokens of all sequences, packed one after the other. H: query heads. K: KV heads. D: head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.numerics import cast_e4m3


def joined(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer's result [T, N] from the parts [S, T, N] that it may come in (skinny.py)."""
    return x.sum(dim=0).to(dtype) if x.ndim == 3 else x


def known_tokens(tokens: Tensor, sampled: Tensor) -> Tensor:
    """tokens [T] as int64, -1 - i being sampled[i]."""
    tokens = tokens.long()
    return torch.where(tokens < 0, sampled[(-1 - tokens).clamp(min=0)], tokens)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row [B, vocab], the first of equal ones; -1 where the largest is NaN or
    Inf. [B] int64."""
    largest, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(largest), tokens, -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside.

    arXiv 1910.07467. Rounds to x's type before the weight multiplies, as transformers does; after it where
    the weight is wider than x (Gemma). mean: of the squares, [..., 1], if not that of x.
    """
    y = x.float()
    mean = y.square().mean(dim=-1, keepdim=True) if mean is None else mean
    y = y * torch.rsqrt(mean + eps)
    if weight.dtype != x.dtype:
        return (weight * y).to(x.dtype)
    return weight * y.to(x.dtype)


def norm_all_heads(
    qkv: Tensor, norms: tuple[Tensor, Tensor], eps: float, means: Tensor | None = None
) -> Tensor:
    """q and k of a fused [T, (H + 2K)·D] normed, each over all its heads' channels together (OLMo 2).

    norms: weights [H·D] and [K·D]. means: of the squares of q and of k, [T, 2], where more heads count than
    are here.
    """
    sizes = [len(norms[0]), len(norms[1])]
    q, k, v = qkv.split([*sizes, sizes[1]], dim=-1)
    of_q, of_k = (None, None) if means is None else means.split(1, dim=-1)
    return torch.cat(
        [rms_norm(q, norms[0], eps, of_q), rms_norm(k, norms[1], eps, of_k), v], dim=-1
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, arXiv 2104.09864, halves of the first R channels rotated against each other, the others left.

    x: [T, heads, D]; cos, sin: [T, 1, R], in x's type, or wider: it is rounded once then.
    """
    turning, rest = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def gated(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """silu(gate) · up, or gelu, of a fused [T, 2·intermediate]. arXiv 2002.05202."""
    gate, up = gate_up.chunk(2, dim=-1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return active * up


def shares_of(logits: Tensor, top_k: int, *, sums_to_one: bool) -> tuple[Tensor, Tensor]:
    """Shares of the `top_k` likeliest experts of each token, float32, and which they are, both [T, top_k].

    logits: of the router, [T, experts]. The shares are the softmax over all experts; sums_to_one: divided
    by the sum of those chosen.
    """
    shares, chosen = F.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if sums_to_one:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares, chosen


def through_experts(
    x: Tensor, logits: Tensor, top_k: int, expert: Callable[[int, Tensor], Tensor], *,
    sums_to_one: bool, in_float32: bool,
) -> Tensor:  # fmt: skip
    """Each token through its `top_k` likeliest experts, and the sum of what they make by their shares.

    x: [T, hidden]. logits: of the router, [T, experts]. expert: its number and its tokens' inputs to their
    outputs. in_float32: the outputs are multiplied with them in float32, not in their own type.
    """
    shares, chosen = shares_of(logits, top_k, sums_to_one=sums_to_one)
    if not in_float32:
        shares = shares.to(x.dtype)
    out = torch.zeros_like(x)
    for number in chosen.unique().tolist():
        token, place = torch.where(chosen == number)
        made = expert(number, x[token]) * shares[token, place, None]
        out = out.index_add(0, token, made.to(out.dtype))
    return out


def split_heads(
    qkv: Tensor, rotation: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None, eps: float,
    heads: int, kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [T, H, D], k and v [T, K, D] of a fused [T, (H + 2K)·D]: q and k normed and rotated.

    rotation: cos and sin of each token, [T, 1, R]. norms: weights [D] of q's and k's norm, if any.
    """
    size = qkv.shape[-1] // (heads + 2 * kv_heads)
    joined = qkv.unflatten(-1, (-1, size))
    q, k, v = joined.split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    return rotate(q, *rotation), rotate(k, *rotation), v


# where a context counts as long: the GPU kernels then split it into more parts
LONG_CONTEXT = 2048


class PagedBatch(NamedTuple):
    """Which tokens of which sequences one forward pass computes, and where their cache is.

    B sequences. Those with one new token stand first.
    """

    tables: Tensor
    """[B, width] int32: each sequence's cache blocks in order, then anything"""
    contexts: Tensor
    """[B] int32: tokens of each sequence in the cache, the new ones counted"""
    starts: Tensor
    """[B + 1] int32: where each sequence's new tokens begin among all T"""
    positions: Tensor
    """[T] int32: of each token in its sequence"""
    slots: Tensor
    """[T] int32: where each token's key and value go"""
    decodes: Tensor
    """[1] int32: how many sequences have one new token"""
    counts: list[int]
    """How many new tokens each sequence has: its last `count` positions"""
    block_size: int
    """Slots in one block"""
    longest: int
    """No context is longer"""


class Cache(NamedTuple):
    """One layer's keys and values."""

    keys: Tensor
    """[slots, K, D]"""
    values: Tensor
    """[slots, K, D]"""
    scales: tuple[Tensor, Tensor] | None = None
    """Of keys and of values, each [1], where they are codes"""
    window: int | None = None
    """Positions that a token sees, itself included; None: all"""


class HeadInputs(NamedTuple):
    """What q and k go through before attention."""

    rotation: tuple[Tensor, Tensor]
    """cos and sin of every position, each [positions, R], in the computing type or in float32 (`rotate`)"""
    heads: int
    dtype: torch.dtype
    """What is computed in"""
    norms: tuple[Tensor, Tensor] | None = None
    """Weights [D] of q's and k's norm"""
    eps: float = 0.0
    scale: float | None = None
    """What products of queries and keys are multiplied with; None: 1 / sqrt(D)"""


def output_logits(
    states: Tensor, norm: Tensor, head: Tensor, eps: float, divisor: float = 1.0
) -> Tensor:
    """Logits [T, vocab] of the last layer's outputs [T, hidden]: final norm, head [vocab, hidden], and what
    the model divides them by. All in float32: rounded to 16 bits, they differ by a thousandth of a nat by
    chance."""
    logits = F.linear(rms_norm(states.float(), norm.float(), eps), head.float())
    return logits if divisor == 1 else logits / divisor


def encode(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of keys or values with one given scale, INT8 or E4M3."""
    x = x.float() / scale.float()
    return x.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else cast_e4m3(x)


def store(cache: Tensor, slots: Tensor, new: Tensor, scale: Tensor | None) -> None:
    """Write new keys or values [T, K, D] to their slots of a cache [slots, K, D]."""
    if scale is None:
        cache[slots] = new
    else:  # torch writes no 8-bit floats by index, but bytes
        cache.view(torch.uint8)[slots] = encode(new, scale, cache.dtype).view(torch.uint8)


def _fetch(cache: Tensor, slots: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return cache[slots]
    codes = cache.view(torch.uint8)[slots].view(cache.dtype)
    return (codes.float() * scale.float()).to(dtype)


def cached_attention(qkv: Tensor, inputs: HeadInputs, cache: Cache, batch: PagedBatch) -> Tensor:
    """Norm and RoPE of q and k, k and v into the cache, attention over it. qkv: [T, (H + 2K)·D] or its
    parts. Returns [T, H·D]."""
    cos, sin = inputs.rotation
    positions, slots = batch.positions.long(), batch.slots.long()
    q, k, v = split_heads(
        joined(qkv, inputs.dtype), (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)),
        inputs.norms, inputs.eps, inputs.heads, cache.keys.shape[1],
    )  # fmt: skip
    k_scale, v_scale = cache.scales or (None, None)
    store(cache.keys, slots, k, k_scale)
    store(cache.values, slots, v, v_scale)
    return paged_attention(q, cache, batch, inputs.scale).flatten(1)


def paged_attention(
    q: Tensor, cache: Cache, batch: PagedBatch, scale: float | None = None
) -> Tensor:
    """Causal attention of new tokens over their sequences' cached keys and values.

    q: [T, H, D]; the new tokens' entries are in the cache already. scale: as HeadInputs'. Returns
    [T, H, D].
    """
    keys, values, scales, window = cache
    k_scale, v_scale = scales or (None, None)
    offsets = torch.arange(batch.block_size, device=q.device)
    contexts = batch.contexts.tolist()
    tables = [
        (blocks.long().unsqueeze(1) * batch.block_size + offsets).flatten()[:context]
        for blocks, context in zip(batch.tables, contexts, strict=True)
    ]
    if all(count == 1 for count in batch.counts):
        slots = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)  # [B, longest]
        k, v = _fetch(keys, slots, k_scale, q.dtype), _fetch(values, slots, v_scale, q.dtype)
        return _decode_attention(q, k, v, batch.contexts, window, scale)
    outputs = []
    start = 0
    for slots, context, count in zip(tables, contexts, batch.counts, strict=True):
        mask = _causal_mask(context, count, window, q.device)
        out = F.scaled_dot_product_attention(
            q[start : start + count].transpose(0, 1).unsqueeze(0),  # [1, H, count, D]
            _fetch(keys, slots, k_scale, q.dtype)
            .transpose(0, 1)
            .unsqueeze(0),  # [1, K, context, D]
            _fetch(values, slots, v_scale, q.dtype).transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            scale=scale,
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
    q: Tensor, k: Tensor, v: Tensor, contexts: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """One new token per sequence, the contexts padded to one length. k, v: [B, longest, K, D]."""
    key = torch.arange(k.shape[1], device=q.device)
    visible = key < contexts.unsqueeze(1)
    if window is not None:
        visible &= key >= (contexts - window).unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),  # [B, H, 1, D]
        k.transpose(1, 2),  # [B, K, longest, D]
        v.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(2)
