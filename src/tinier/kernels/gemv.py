"""A linear layer over one to four tokens: what decoding a few requests spends its time on. In Triton.

Reading the weight is all there is to do, so a program reads whole rows of it as they lie, in FP8 or INT4
where they are stored so, expands them in registers, and multiplies in float32 with activations that are
not rounded. The norm before the layer and SiLU·mul behind it are part of the same kernel: at this size
a kernel of its own costs as much as its arithmetic. The plain version is `reference` plus F.linear.

A norm divides by a number that is known only when the row has been read. It is a factor of the whole
output, so the products are summed beside the squares, and divided at the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tinier.numerics import Quantized

MOST_TOKENS = 4
_NIBBLES = 8  # codes in a packed word


class Rows(NamedTuple):
    """A weight [out, in] as the kernel reads it."""

    codes: Tensor
    """[out, in] bf16 or E4M3; [out, in/8] int32 of INT4 codes (`pack_int4`)"""
    scale: Tensor | None
    """[out] float32 for E4M3; [out, groups] for INT4"""
    bias: Tensor | None
    group_size: int = 0
    """Of INT4"""


def pack_int4(quantized: Quantized, group_size: int) -> Tensor:
    """INT4 codes [out, in] as words [out, in/8]: nibble i of a group's word j is its value i·(g/8) + j,
    counted from 0 to 15. Eight codes next to each other in a word are then eight slices of the input."""
    rows, columns = quantized.codes.shape
    unsigned = (quantized.codes.int() + 8).view(rows, columns // group_size, _NIBBLES, -1)
    shifts = torch.arange(0, 32, 4, device=unsigned.device).view(1, 1, _NIBBLES, 1)
    words = (unsigned.long() << shifts).sum(dim=2)
    return (words - ((words >> 31) << 32)).to(torch.int32).flatten(1)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(codes, n, k, N: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows n [BLOCK_N] and columns k [.., VEC] of the weight."""
    at = codes + n[:, None, None].to(tl.int64) * K + k[None, :, :]
    if WHOLE:
        loaded = tl.load(at, cache_modifier=".cg")
    else:
        # what is outside meets an input of 0, but must not be NaN
        zero = tl.zeros([1], codes.dtype.element_ty)
        loaded = tl.load(at, mask=(n[:, None, None] < N) & (k[None, :, :] < K), other=zero)
    return loaded


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(
    x, delta, norm, row, k, M, K: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Columns k of x + delta [ROWS, .., VEC], in its own type and times the norm's weight in float32."""
    at = row[:, None, None] * K + k[None, :, :]
    inside = (row[:, None, None] < M) & (k[None, :, :] < K)
    value = tl.load(x + at, mask=inside, other=0.0)
    if HAS_DELTA:
        other = tl.load(delta + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    scaled = value.to(tl.float32)
    if HAS_NORM:
        scaled *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :, :]
    return value, scaled


@triton.jit  # type: ignore[untyped-decorator]
def _gemv(  # type: ignore[no-untyped-def]
    x, delta, norm, codes, scale, bias, out, summed, eps, M, N: tl.constexpr, K: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    VEC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    row = tl.arange(0, ROWS)
    WHOLE: tl.constexpr = (N % BLOCK_N == 0) & (K % BLOCK_K == 0)
    upper = n + N
    WEIGHT_ROWS: tl.constexpr = 2 * N if GATED else N
    w = _tile(codes, n, k, N, K, WHOLE)
    if GATED:
        w_up = _tile(codes, upper, k, WEIGHT_ROWS, K, WHOLE)
    if EARLY:  # weights do not depend on the kernel before
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([ROWS, BLOCK_N, BLOCK_K // VEC], tl.float32)
    acc_up = acc
    squares = tl.zeros([ROWS, BLOCK_K // VEC], tl.float32)
    for step in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        at = step * BLOCK_K + k
        here = w.to(tl.float32)
        if GATED:
            here_up = w_up.to(tl.float32)
        if (step + 1) * BLOCK_K < K:
            w = _tile(codes, n, at + BLOCK_K, N, K, WHOLE)
            if GATED:
                w_up = _tile(codes, upper, at + BLOCK_K, WEIGHT_ROWS, K, WHOLE)
        value, y = _inputs(x, delta, norm, row, at, M, K, HAS_DELTA, HAS_NORM)
        acc += tl.sum(here[None, :, :, :] * y[:, None, :, :], axis=3)
        if GATED:
            acc_up += tl.sum(here_up[None, :, :, :] * y[:, None, :, :], axis=3)
        if HAS_NORM:
            squares += tl.sum(value.to(tl.float32) * value.to(tl.float32), axis=2)
        if HAS_DELTA and pid == 0:
            into = summed + row[:, None, None] * K + at[None, :, :]
            tl.store(into, value, mask=(row[:, None, None] < M) & (at[None, :, :] < K))
    result = tl.sum(acc, axis=2)
    gate_up = tl.sum(acc_up, axis=2)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
    _finish(result, gate_up, factor, scale, bias, out, row, n, M, N, HAS_BIAS, SCALED, GATED)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    result,
    up,
    factor,
    scale,
    bias,
    out,
    row,
    n,
    M,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Scales, bias, SiLU·mul; writes [ROWS, BLOCK_N]."""
    stored = out.dtype.element_ty
    result = result * factor[:, None]
    if SCALED:
        result = result * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        result = result + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = up * factor[:, None]
        if SCALED:
            up = up * tl.load(scale + n + N, mask=n < N, other=0.0)[None, :]
        if HAS_BIAS:
            up = up + tl.load(bias + n + N, mask=n < N, other=0.0).to(tl.float32)[None, :]
        # rounded where the separate operators round
        gate = result.to(stored).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(stored).to(tl.float32)
        result = gate * up.to(stored).to(tl.float32)
    inside = (row[:, None] < M) & (n[None, :] < N)
    tl.store(out + row[:, None] * N + n[None, :], result.to(stored), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(words, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nibble i of each word as the float32 128 + code: the code is put into the mantissa's top bits."""
    if i < 4:
        moved = words << (16 - 4 * i)
    else:
        moved = words >> (4 * i - 16)
    return ((moved & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _words(codes, n, word, N: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = codes + n[:, None, None].to(tl.int64) * W + word[None, :, :]
    if WHOLE:
        loaded = tl.load(at, cache_modifier=".cg")
    else:
        loaded = tl.load(at, mask=(n[:, None, None] < N) & (word[None, :, :] < W), other=0)
    return loaded


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_int4(  # type: ignore[no-untyped-def]
    x, delta, norm, codes, scale, bias, out, summed, eps, M, N: tl.constexpr, K: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    LANES: tl.constexpr = GROUP // 8  # words in a group
    W: tl.constexpr = K // 8
    ALL: tl.constexpr = K // GROUP
    WHOLE: tl.constexpr = (N % BLOCK_N == 0) & (ALL % GROUPS == 0)
    WEIGHT_ROWS: tl.constexpr = 2 * N if GATED else N
    group = tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    word = group[:, None] * LANES + lane[None, :]
    row = tl.arange(0, ROWS)
    upper = n + N
    w = _words(codes, n, word, N, W, WHOLE)
    if GATED:
        w_up = _words(codes, upper, word, WEIGHT_ROWS, W, WHOLE)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([ROWS, BLOCK_N, GROUPS, LANES], tl.float32)
    acc_up = acc
    squares = tl.zeros([ROWS, GROUPS, LANES], tl.float32)
    for step in tl.static_range((ALL + GROUPS - 1) // GROUPS):
        here = w
        if GATED:
            here_up = w_up
        g = step * GROUPS + group
        if (step + 1) * GROUPS < ALL:
            w = _words(codes, n, (step + 1) * GROUPS * LANES + word, N, W, WHOLE)
            if GATED:
                w_up = _words(
                    codes, upper, (step + 1) * GROUPS * LANES + word, WEIGHT_ROWS, W, WHOLE
                )
        inside = (n[:, None, None] < N) & (g[None, :, None] < ALL)
        s = tl.load(scale + n[:, None, None] * ALL + g[None, :, None], mask=inside, other=0.0)
        if GATED:
            s_up = tl.load(
                scale + upper[:, None, None] * ALL + g[None, :, None], mask=inside, other=0.0
            )
        part = tl.zeros([ROWS, BLOCK_N, GROUPS, LANES], tl.float32)
        part_up = part
        total = tl.zeros([ROWS, GROUPS, LANES], tl.float32)
        for i in tl.static_range(8):
            k = g[:, None] * GROUP + i * LANES + lane[None, :]
            value, y = _inputs(x, delta, norm, row, k, M, K, HAS_DELTA, HAS_NORM)
            part += _expand(here, i)[None, :, :, :] * y[:, None, :, :]
            if GATED:
                part_up += _expand(here_up, i)[None, :, :, :] * y[:, None, :, :]
            total += y
            if HAS_NORM:
                squares += value.to(tl.float32) * value.to(tl.float32)
            if HAS_DELTA and pid == 0:
                into = summed + row[:, None, None] * K + k[None, :, :]
                tl.store(into, value, mask=(row[:, None, None] < M) & (k[None, :, :] < K))
        # 128 of the expansion, and 8 that codes are counted from
        acc += (part - 136.0 * total[:, None, :, :]) * s.to(tl.float32)[None, :, :, :]
        if GATED:
            acc_up += (part_up - 136.0 * total[:, None, :, :]) * s_up.to(tl.float32)[None, :, :, :]
    result = tl.sum(tl.sum(acc, axis=3), axis=2)
    up = tl.sum(tl.sum(acc_up, axis=3), axis=2)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=1) / K + eps)
    _finish(result, up, factor, scale, bias, out, row, n, M, N, HAS_BIAS, False, GATED)
