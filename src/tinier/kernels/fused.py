"""The decoder's small operators as one Triton kernel each. Plain torch: reference.py.

In eager torch each of them is several passes over memory and several launches. A program here owns a
token: it reads the row once, computes in float32, rounds where the reference rounds, and writes the row
in the type that the next matrix product takes, with its scale where that is quantized.

Inputs [S, T, N] in float32 are the parts of a product whose inner dimension was split (skinny.py): they are
summed here, and rounded as the product would have been. On Hopper each kernel starts while the one before
it ends, and waits for its results (`begin`).
"""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tinier.kernels.machine import machine_of
from tinier.kernels.peers import EMPTY, MOST_PEER_TOKENS, Peers
from tinier.kernels.table import Table
from tinier.numerics import E4M3_MAX, Quantized

CODES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_EMPTY = tl.constexpr(EMPTY)
LARGEST = {"e4m3": E4M3_MAX, "int8": 127.5}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, for tests without a GPU: it has no inline assembly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def early_start() -> dict[str, bool]:
    """Launch options of every kernel: whether it may start before the one in front of it ends."""
    hopper = torch.cuda.is_available() and machine_of(torch.device("cuda")).capability >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}


@triton.jit  # type: ignore[untyped-decorator]
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel come as soon as there is room, and wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 as it is after a stay in `dtype`."""
    return x.to(dtype).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def weighted(y, w, kept: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A normed row times the norm's weight, which is kept in that type, as float32 rounded to `dtype`; it
    is rounded before too, unless the weight is kept wider (reference.rms_norm)."""
    if kept == dtype:
        y = rounded(y, dtype)
    return rounded(w * y, dtype)


@triton.jit  # type: ignore[untyped-decorator]
def summed_parts(source, at, inside, stride, PARTS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies at `source + at`, or the sum of PARTS such, as float32 rounded to `dtype`."""
    value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(source + part * stride + at, mask=inside, other=0.0).to(tl.float32)
    return rounded(value, dtype)


@triton.jit  # type: ignore[untyped-decorator]
def code(y, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to the nearest INT8 or E4M3, halves to even."""
    if dtype == tl.int8:
        # adding 1.5 · 2^23 leaves no bits for a fraction
        y = (y + 12582912.0) - 12582912.0
        return tl.clamp(y, -128.0, 127.0).to(tl.int8)
    else:
        return tl.clamp(y, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def token_scale(size, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a token whose largest number is `size` (numerics.quantize_tokens_*)."""
    scale = tl.div_rn(size, LARGEST)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit  # type: ignore[untyped-decorator]
def store_row(y, out, scales, row, at, inside, TAKES: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a row as it is, or as codes with one scale."""
    if TAKES is None:
        tl.store(out + at, y, mask=inside)
    else:
        scale = token_scale(tl.max(tl.where(inside, tl.abs(y), 0.0), axis=0), LARGEST)
        y = y * tl.div_rn(1.0, scale)
        tl.store(out + at, code(y, out.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _embed(  # type: ignore[no-untyped-def]
    tokens, sampled, codes, scale, out, vocab, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    TIMES: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUP: columns of a scale, of INT4; 0: numbers, or 8-bit codes with a scale for each row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    token = tl.load(tokens + row).to(tl.int64)
    if token < 0:
        token = tl.load(sampled - 1 - token)
    if GROUP:
        # words [vocab/64, SIZE/128, 64, 16] of skinny.pack_int4: word j has the columns 16·i + j of 128
        word = (token // 64 * tl.cdiv(SIZE, 128) + at // 128) * 1024 + token % 64 * 16 + at % 16
        nibble = tl.load(codes + word, mask=inside) >> (at % 128 // 16 * 4)
        value = ((nibble & 15) - 8).to(tl.float32)
        value *= tl.load(scale + at // GROUP * vocab + token, mask=inside).to(tl.float32)
    else:
        value = tl.load(codes + token * SIZE + at, mask=inside)
        if scale is not None:
            value = value.to(tl.float32) * tl.load(scale + token)
    if TIMES != 1.0:
        # what is stored is a number of the computing type before it is multiplied
        value = value.to(out.dtype.element_ty).to(tl.float32) * TIMES
    tl.store(out + row * SIZE + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _send(bits, addresses, at, inside, RANK: tl.constexpr, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write int32 to `at` in the memory of all other processes (peers.py)."""
    bits = tl.where(bits == _EMPTY, 0, bits)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = tl.load(addresses + rank).to(tl.pointer_type(tl.int32))
            tl.store(theirs + at, bits, mask=inside)


@triton.jit
def _received(place, inside):  # type: ignore[no-untyped-def]
    """The int32 that another process sends to these places of ours, which are empty again."""
    bits = tl.load(place, mask=inside, other=0, volatile=True)
    while tl.min(bits, axis=0) == _EMPTY:
        bits = tl.load(place, mask=inside, other=0, volatile=True)
    tl.store(place, tl.full(bits.shape, _EMPTY, tl.int32), mask=inside)
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def _over_processes(  # type: ignore[no-untyped-def]
    value, addresses, row, at, inside, SIZE: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """The sum of a row of float32 over all processes (peers.py)."""
    at += (TURN * RANKS * ROWS + row) * SIZE
    _send(value.to(tl.int32, bitcast=True), addresses, RANK * ROWS * SIZE + at, inside, RANK, RANKS)
    mine = tl.load(addresses + RANK).to(tl.pointer_type(tl.int32))
    total = tl.zeros_like(value)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += value
        else:
            got = _received(mine + rank * ROWS * SIZE + at, inside)
            total += got.to(tl.float32, bitcast=True)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _side_by_side(  # type: ignore[no-untyped-def]
    part, out, addresses, first, room, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of WIDTH int32 of every process, one after the other. A process's begin `first` into the
    memory and have `room`."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    own = tl.load(part + row * WIDTH + at, mask=inside, other=0)
    place = first + row * WIDTH + at
    _send(own, addresses, place + RANK * room, inside, RANK, RANKS)
    mine = tl.load(addresses + RANK).to(tl.pointer_type(tl.int32))
    for rank in tl.static_range(RANKS):
        value = own
        if rank != RANK:
            value = _received(mine + place + rank * room, inside)
        tl.store(out + (row * RANKS + rank) * WIDTH + at, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, between, summed, out, scales, addresses, eps, stride, SIZE: tl.constexpr,
    NORM: tl.constexpr, BETWEEN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    TIMES: tl.constexpr, TAKES: tl.constexpr, LARGEST: tl.constexpr, TURN: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    stored = x.dtype.element_ty
    if NORM:
        w = tl.load(weight + at, mask=inside, other=0.0)
    begin(PDL)
    value = tl.load(x + row * SIZE + at, mask=inside, other=0.0)
    if PARTS > 0:
        if RANKS == 1:
            other = summed_parts(delta, row * SIZE + at, inside, stride, PARTS, stored)
        else:
            part = summed_parts(delta, row * SIZE + at, inside, stride, PARTS, tl.float32)
            part = _over_processes(part, addresses, row, at, inside, SIZE, TURN, ROWS, RANK, RANKS)
            other = rounded(part, stored)
        if BETWEEN:
            v = tl.load(between + at, mask=inside, other=0.0).to(tl.float32)
            other = other * tl.rsqrt(tl.sum(other * other, axis=0) / SIZE + eps)
            other = weighted(other, v, between.dtype.element_ty, stored)
        if TIMES != 1.0:
            other = rounded(other * TIMES, stored)
        value = (value.to(tl.float32) + other).to(stored)
        tl.store(summed + row * SIZE + at, value, mask=inside)
    y = value
    if NORM:
        y = y.to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / SIZE + eps)
        y = weighted(y, w.to(tl.float32), weight.dtype.element_ty, stored).to(stored)
    if TAKES is not None:
        y = y.to(tl.float32)
    store_row(y, out + row * SIZE, scales, row, at, inside, TAKES, LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_all_heads(  # type: ignore[no-untyped-def]
    qkv, q_norm, k_norm, out, eps, stride, Q: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q, k or v of a token, Q or K channels; q and k normed."""
    begin(PDL)
    which = tl.program_id(1)
    size = tl.where(which == 0, Q, K)
    begun = tl.where(which == 0, 0, Q + (which - 1) * K)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    at = tl.program_id(0).to(tl.int64) * (Q + 2 * K) + begun + channel
    stored = out.dtype.element_ty
    x = summed_parts(qkv, at, inside, stride, PARTS, stored)
    if which < 2:
        kept: tl.constexpr = q_norm.dtype.element_ty
        w = tl.load(q_norm + channel, mask=channel < tl.where(which == 0, Q, 0), other=0.0)
        w += tl.load(k_norm + channel, mask=channel < tl.where(which == 1, K, 0), other=0.0)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
        x = weighted(x, w.to(tl.float32), kept, stored)
    tl.store(out + at, x.to(stored), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gated(  # type: ignore[no-untyped-def]
    gate_up, out, scales, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    stored: tl.constexpr, GELU: tl.constexpr, TAKES: tl.constexpr, LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = summed_parts(gate_up, row * 2 * SIZE + at, inside, stride, PARTS, stored)
    up = summed_parts(gate_up, row * 2 * SIZE + SIZE + at, inside, stride, PARTS, stored)
    inner = gate
    if GELU:  # the tanh form, as a sigmoid
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    y = gate / (1.0 + tl.exp(-inner))
    y = (y.to(stored).to(tl.float32) * up).to(stored)
    if TAKES is not None:
        y = y.to(tl.float32)
    store_row(y, out + row * SIZE, scales, row, at, inside, TAKES, LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def _encode_rows(  # type: ignore[no-untyped-def]
    x, out, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr, TAKES: tl.constexpr,
    LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    y = tl.load(x + row * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    store_row(y, out + row * SIZE, scales, row, at, inside, TAKES, LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x, turn, q_norm, k_norm, at, there, is_q, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half of each head times `turn` and the weights of its norm."""
    q_weight = tl.load(q_norm + at, mask=there, other=0.0)
    k_weight = tl.load(k_norm + at, mask=there, other=0.0)
    w = tl.where(is_q, q_weight, k_weight).to(tl.float32)
    return weighted(x * turn[:, None], w, q_norm.dtype.element_ty, dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv, cos, sin, positions, slots, q_norm, k_norm, k_scale, v_scale, q_out, k_cache, v_cache, eps,
    stride, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, CODED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Of each head the first R channels turn, in halves, the others stay."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    is_q = head < H
    is_k = (head >= H) & (head < H + K)
    is_v = (head >= H + K) & (head < H + 2 * K)
    inside = head < H + 2 * K
    there = half >= 0
    if HALF * 2 != R:  # no power of two
        there = half < R // 2
    at = row * (H + 2 * K) * D + head * D
    stored = q_out.dtype.element_ty
    first = summed_parts(qkv, at + half, inside & there, stride, PARTS, stored)
    second = summed_parts(qkv, at + R // 2 + half, inside & there, stride, PARTS, stored)
    if R < D:
        beyond = R + tl.arange(0, REST)[None, :]
        rest = summed_parts(qkv, at + beyond, inside & (beyond < D), stride, PARTS, stored)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if R < D:
            squares += tl.sum(rest * rest, axis=1)
        turn = tl.rsqrt(squares / D + eps)
        first = tl.where(
            is_v, first, _normed(first, turn, q_norm, k_norm, half, there, is_q, stored)
        )
        second = tl.where(
            is_v, second, _normed(second, turn, q_norm, k_norm, half + R // 2, there, is_q, stored)
        )
        if R < D:
            rest = tl.where(
                is_v, rest, _normed(rest, turn, q_norm, k_norm, beyond, beyond < D, is_q, stored)
            )
    position = tl.load(positions + row)
    wide: tl.constexpr = cos.dtype.element_ty
    c = tl.load(cos + position * R + half, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + position * R + half, mask=there, other=0.0).to(tl.float32)
    turned = rounded(first * c, wide) - rounded(second * s, wide)
    low = tl.where(is_v, first, turned)
    turned = rounded(second * c, wide) + rounded(first * s, wide)
    high = tl.where(is_v, second, turned)
    slot = tl.load(slots + row).to(tl.int64)
    to_q = q_out + row * H * D + head * D
    to_k = k_cache + slot * K * D + (head - H) * D
    to_v = v_cache + slot * K * D + (head - H - K) * D
    scale = 1.0
    if CODED:
        scale = tl.where(is_k, tl.load(k_scale), tl.load(v_scale))
    _store_heads(low, half, there, to_q, to_k, to_v, is_q, is_k, is_v, scale, CODED)
    _store_heads(high, half + R // 2, there, to_q, to_k, to_v, is_q, is_k, is_v, scale, CODED)
    if R < D:
        _store_heads(rest, beyond, beyond < D, to_q, to_k, to_v, is_q, is_k, is_v, scale, CODED)


@triton.jit  # type: ignore[untyped-decorator]
def _store_heads(  # type: ignore[no-untyped-def]
    x, at, there, to_q, to_k, to_v, is_q, is_k, is_v, scale, CODED: tl.constexpr
):  # fmt: skip
    """Channels `at` of each head [heads, channels] to where it belongs, k and v as codes of the cache's
    type."""
    x = x.to(to_q.dtype.element_ty)
    tl.store(to_q + at, x, mask=is_q & there)
    kept = x
    if CODED:
        x = x.to(tl.float32)
        kept = code(tl.div_rn(x, scale + tl.zeros_like(x)), to_k.dtype.element_ty)
    tl.store(to_k + at, kept, mask=is_k & there)
    tl.store(to_v + at, kept, mask=is_v & there)


def embed(tokens: Tensor, sampled: Tensor, table: Table, times: float) -> Tensor:
    """Rows of an embedding, times a number, for tokens [T]; token -1 - i is sampled[i]."""
    count, size = tokens.shape[0], table.hidden
    out = torch.empty(count, size, dtype=table.dtype, device=table.codes.device)
    group = vocab = 0
    if table.codes.dtype == torch.int32:
        assert table.scale is not None
        groups, vocab = table.scale.shape
        group = size // groups
    _embed[(count,)](
        tokens, sampled, table.codes, table.scale, out, vocab, SIZE=size,
        BLOCK=triton.next_power_of_2(size), TIMES=times, GROUP=group, num_warps=4, **early_start(),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float, takes: str | None,
    times: float = 1.0, between: Tensor | None = None, peers: Peers | None = None, turn: int = 0,
) -> tuple[Tensor, Tensor | Quantized]:  # fmt: skip
    """x + times · delta [T, hidden], and its norm as the next layer takes it. delta: [T, hidden] or parts.

    weight: None: the sum itself as the next layer takes it. between: weight of a norm that delta goes
    through first. peers: delta is summed over the processes too. turn: 0 and 1 by turns (peers.py).
    """
    tokens, size = x.shape
    if delta is None and weight is None and takes is None:
        return x, x
    summed = x if delta is None else torch.empty_like(x)
    out, scales = _row_buffers(tokens, size, x.dtype, x.device, takes)
    _add_rms_norm[(tokens,)](
        x, x if delta is None else delta, x if weight is None else weight,
        x if between is None else between, summed, out, scales,
        peers.addresses if peers else x, eps, x.numel(), SIZE=size,
        NORM=weight is not None, BETWEEN=between is not None, BLOCK=triton.next_power_of_2(size),
        PARTS=0 if delta is None else parts_of(delta),
        TIMES=times, TAKES=takes, LARGEST=LARGEST.get(takes or "", 0.0), TURN=turn, ROWS=MOST_PEER_TOKENS,
        RANK=peers.rank if peers else 0, RANKS=peers.size if peers else 1,
        # many threads wait for a row's parts better (docs/log.md)
        num_warps=32 if peers and size > 2048 else _warps(size, tokens), **early_start(),
    )  # fmt: skip
    return summed, out if takes is None else Quantized(out, scales)


def side_by_side(part: Tensor, peers: Peers) -> Tensor:
    """[T, whole] of the processes' [T, N], for which `peers` has room (Peers.fits_logits)."""
    rows, columns = part.shape
    out = torch.empty(rows, peers.size * columns, dtype=part.dtype, device=part.device)
    words = part.view(torch.int32)
    width = words.shape[1]
    _side_by_side[(rows, triton.cdiv(width, 2048))](
        words, out.view(torch.int32), peers.addresses, *peers.next_places(), WIDTH=width, BLOCK=2048,
        RANK=peers.rank, RANKS=peers.size, num_warps=8, **early_start(),
    )  # fmt: skip
    return out


def norm_all_heads(
    qkv: Tensor, norms: tuple[Tensor, Tensor], eps: float, dtype: torch.dtype
) -> Tensor:
    """q and k of a fused [T, (H + 2K)·D], or of its parts, normed, each over all its heads' channels
    together; in dtype."""
    tokens, whole = qkv.shape[-2:]
    q, k = len(norms[0]), len(norms[1])
    out = torch.empty(tokens, whole, dtype=dtype, device=qkv.device)
    _norm_all_heads[(tokens, 3)](
        qkv, *norms, out, eps, tokens * whole, Q=q, K=k, BLOCK=triton.next_power_of_2(max(q, k)),
        PARTS=parts_of(qkv), num_warps=8, **early_start(),
    )  # fmt: skip
    return out


def gated(
    gate_up: Tensor, dtype: torch.dtype, takes: str | None, activation: str = "silu"
) -> Tensor | Quantized:
    """silu(gate) · up, or gelu_tanh, of a fused [T, 2·intermediate] or its parts, as the next layer takes
    it."""
    tokens, size = gate_up.shape[-2], gate_up.shape[-1] // 2
    out, scales = _row_buffers(tokens, size, dtype, gate_up.device, takes)
    _gated[(tokens,)](
        gate_up, out, scales, 2 * tokens * size, SIZE=size, BLOCK=triton.next_power_of_2(size),
        PARTS=parts_of(gate_up), stored=TRITON_TYPES[dtype], GELU=activation == "gelu_tanh",
        TAKES=takes, LARGEST=LARGEST.get(takes or "", 0.0), num_warps=_warps(size, tokens), **early_start(),
    )  # fmt: skip
    return out if takes is None else Quantized(out, scales)


def encode_rows(x: Tensor, takes: str) -> Quantized:
    """x [T, N] as codes with one scale a row (numerics.quantize_tokens_*)."""
    tokens, size = x.shape
    out, scales = _row_buffers(tokens, size, x.dtype, x.device, takes)
    _encode_rows[(tokens,)](
        x, out, scales, SIZE=size, BLOCK=triton.next_power_of_2(size), TAKES=takes,
        LARGEST=LARGEST[takes], num_warps=_warps(size, tokens), **early_start(),
    )  # fmt: skip
    return Quantized(out, scales)


def rotate_and_store(
    qkv: Tensor, rotation: tuple[Tensor, Tensor], positions: Tensor, slots: Tensor,
    norms: tuple[Tensor, Tensor] | None, eps: float, heads: int, dtype: torch.dtype,
    keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """q with its norm and RoPE; k, the same, and v written to their cache slots.

    qkv: [T, (heads + 2·kv_heads)·D], or its parts. rotation: cos and sin of every position [P, R].
    positions: [T], slots: [T]. norms: of q and k [D], where the model has them. keys, values:
    [slots, kv_heads, D], codes where the `scales` of keys and values are given. Returns [T, heads, D].
    """
    tokens = qkv.shape[-2]
    _, kv_heads, size = keys.shape
    turning = rotation[0].shape[1]
    q = torch.empty(tokens, heads, size, dtype=dtype, device=qkv.device)
    q_norm, k_norm = norms or (q, q)
    k_scale, v_scale = scales or (q, q)
    every = heads + 2 * kv_heads
    # few tokens: several programs for each
    held = min(16 if tokens < 128 else 64, triton.next_power_of_2(every))
    _rotate_and_store[(tokens, triton.cdiv(every, held))](
        qkv, *rotation, positions, slots, q_norm, k_norm, k_scale, v_scale, q, keys, values, eps,
        tokens * every * size, H=heads, K=kv_heads, D=size,
        R=turning, HALF=triton.next_power_of_2(turning // 2),
        REST=triton.next_power_of_2(max(1, size - turning)), HEADS=held, PARTS=parts_of(qkv),
        NORM=norms is not None, CODED=scales is not None, num_warps=4, **early_start(),
    )  # fmt: skip
    return q


def parts_of(x: Tensor) -> int:
    """How many parts there are to sum."""
    return x.shape[0] if x.ndim == 3 else 1


TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _row_buffers(
    tokens: int, size: int, dtype: torch.dtype, device: torch.device, takes: str | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty(tokens, size, dtype=CODES.get(takes or "", dtype), device=device)
    scales = torch.empty(tokens if takes else 0, 1, dtype=torch.float32, device=device)
    return out, scales


def _warps(size: int, tokens: int) -> int:
    """Few rows should be done soon, many should use all of the GPU."""
    if tokens <= 64:
        return 32 if size > 2048 else 8
    return 4 if size <= 4096 else 16
