"""The decoder's small operators as one Triton kernel each. Plain torch: reference.py.

In eager torch each of them is several passes over memory and several launches. A program here owns a
token: it reads the row once, computes in float32, rounds where the reference rounds, and writes the row
in the type that the next matrix product takes, with its scale where that is quantized.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.numerics import E4M3_MAX, Quantized

_CODES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST = {"e4m3": E4M3_MAX, "int8": 127.5}


@triton.jit  # type: ignore[untyped-decorator]
def _code(y, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to the nearest INT8 or E4M3, halves to even."""
    if dtype == tl.int8:
        # adding 1.5 · 2^23 leaves no bits for a fraction
        y = (y + 12582912.0) - 12582912.0
        return tl.clamp(y, -128.0, 127.0).to(tl.int8)
    else:
        return tl.clamp(y, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def _store_row(y, out, scales, row, at, inside, TAKES: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a row as it is, or as codes with one scale (numerics.quantize_tokens_*)."""
    if TAKES is None:
        tl.store(out + at, y, mask=inside)
    else:
        size = tl.max(tl.where(inside, tl.abs(y), 0.0), axis=0)
        scale = tl.div_rn(size, LARGEST)
        scale = tl.where(scale == 0.0, 1.0, scale)
        y = tl.div_rn(y, tl.zeros_like(y) + scale)
        tl.store(out + at, _code(y, out.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, summed, out, scales, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr, TAKES: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    stored = x.dtype.element_ty
    value = tl.load(x + row * SIZE + at, mask=inside, other=0.0)
    if HAS_DELTA:
        other = tl.load(delta + row * SIZE + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(stored)
        tl.store(summed + row * SIZE + at, value, mask=inside)
    y = value.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / SIZE + eps)
    w = tl.load(weight + at, mask=inside, other=0.0)
    y = (w.to(tl.float32) * y.to(stored).to(tl.float32)).to(stored)
    if TAKES is not None:
        y = y.to(tl.float32)
    _store_row(y, out + row * SIZE, scales, row, at, inside, TAKES, LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(  # type: ignore[no-untyped-def]
    gate_up, out, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    TAKES: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    stored = gate_up.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate))
    y = (y.to(stored).to(tl.float32) * up).to(stored)
    if TAKES is not None:
        y = y.to(tl.float32)
    _store_row(y, out + row * SIZE, scales, row, at, inside, TAKES, LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 as it is after a stay in `dtype`."""
    return x.to(dtype).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x, turn, q_norm, k_norm, at, is_q, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half of each head times `turn` and the weights of its norm."""
    w = tl.where(is_q, tl.load(q_norm + at), tl.load(k_norm + at)).to(tl.float32)
    return _rounded(_rounded(x * turn[:, None], dtype) * w, dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv, cos, sin, positions, slots, q_norm, k_norm, k_scale, v_scale, q_out, k_cache, v_cache, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, D // 2)[None, :]
    is_q = head < H
    is_k = (head >= H) & (head < H + K)
    is_v = (head >= H + K) & (head < H + 2 * K)
    inside = head < H + 2 * K
    source = qkv + row * (H + 2 * K) * D + head * D + half
    stored = qkv.dtype.element_ty
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        turn = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)
        first = tl.where(is_v, first, _normed(first, turn, q_norm, k_norm, half, is_q, stored))
        second = tl.where(
            is_v, second, _normed(second, turn, q_norm, k_norm, half + D // 2, is_q, stored)
        )
    position = tl.load(positions + row)
    c = tl.load(cos + position * D + half).to(tl.float32)
    s = tl.load(sin + position * D + half).to(tl.float32)
    turned = _rounded(first * c, stored) - _rounded(second * s, stored)
    low = tl.where(is_v, first, turned).to(stored)
    turned = _rounded(second * c, stored) + _rounded(first * s, stored)
    high = tl.where(is_v, second, turned).to(stored)
    target = q_out + row * H * D + head * D + half
    tl.store(target, low, mask=is_q)
    tl.store(target + D // 2, high, mask=is_q)
    slot = tl.load(slots + row).to(tl.int64)
    if CODED:
        scale = tl.where(is_k, tl.load(k_scale), tl.load(v_scale))
        low = _code(
            tl.div_rn(low.to(tl.float32), scale + tl.zeros_like(first)), k_cache.dtype.element_ty
        )
        high = _code(
            tl.div_rn(high.to(tl.float32), scale + tl.zeros_like(first)), k_cache.dtype.element_ty
        )
    to_k = k_cache + slot * K * D + (head - H) * D + half
    tl.store(to_k, low, mask=is_k)
    tl.store(to_k + D // 2, high, mask=is_k)
    to_v = v_cache + slot * K * D + (head - H - K) * D + half
    tl.store(to_v, low, mask=is_v)
    tl.store(to_v + D // 2, high, mask=is_v)


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, takes: str | None
) -> tuple[Tensor, Tensor | Quantized]:
    """x + delta [T, hidden], and its norm as the next layer takes it."""
    tokens, size = x.shape
    summed = x if delta is None else torch.empty_like(x)
    out, scales = _row_buffers(x, size, takes)
    _add_rms_norm[(tokens,)](
        x, x if delta is None else delta, weight, summed, out, scales, eps, SIZE=size,
        BLOCK=triton.next_power_of_2(size), HAS_DELTA=delta is not None, TAKES=takes,
        LARGEST=_LARGEST.get(takes or "", 0.0), num_warps=_warps(size),
    )  # fmt: skip
    return summed, out if takes is None else Quantized(out, scales)


def silu_mul(gate_up: Tensor, takes: str | None) -> Tensor | Quantized:
    """silu(gate) · up of a fused [T, 2·intermediate], as the next layer takes it."""
    size = gate_up.shape[1] // 2
    out, scales = _row_buffers(gate_up, size, takes)
    _silu_mul[(gate_up.shape[0],)](
        gate_up, out, scales, SIZE=size, BLOCK=triton.next_power_of_2(size), TAKES=takes,
        LARGEST=_LARGEST.get(takes or "", 0.0), num_warps=_warps(size),
    )  # fmt: skip
    return out if takes is None else Quantized(out, scales)


def rotate_and_store(
    qkv: Tensor, rotation: tuple[Tensor, Tensor], positions: Tensor, slots: Tensor,
    norms: tuple[Tensor, Tensor] | None, eps: float, heads: int,
    keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """q with its norm and RoPE; k, the same, and v written to their cache slots.

    qkv: [T, (heads + 2·kv_heads)·D]. rotation: cos and sin of every position [P, D]. positions: [T],
    slots: [T]. norms: of q and k [D], where the model has them. keys, values: [slots, kv_heads, D],
    codes where the `scales` of keys and values are given. Returns [T, heads, D].
    """
    tokens = qkv.shape[0]
    _, kv_heads, size = keys.shape
    q = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms or (qkv, qkv)
    k_scale, v_scale = scales or (qkv, qkv)
    _rotate_and_store[(tokens,)](
        qkv, *rotation, positions, slots, q_norm, k_norm, k_scale, v_scale, q, keys, values, eps,
        H=heads, K=kv_heads, D=size, HEADS=triton.next_power_of_2(heads + 2 * kv_heads),
        NORM=norms is not None, CODED=scales is not None, num_warps=4,
    )  # fmt: skip
    return q


def _row_buffers(like: Tensor, size: int, takes: str | None) -> tuple[Tensor, Tensor]:
    tokens, device = like.shape[0], like.device
    out = torch.empty(tokens, size, dtype=_CODES.get(takes or "", like.dtype), device=device)
    scales = torch.empty(tokens if takes else 0, 1, dtype=torch.float32, device=device)
    return out, scales


def _warps(size: int) -> int:
    return 4 if size <= 4096 else 16
