"""Attention over the paged KV cache in Triton. Plain torch: reference.cached_attention.

One new token of a sequence (decode) reads its whole context, so the context is split over programs
whose partial results a second kernel joins (flash decoding); the query heads of one KV head are the
rows of one matrix product. Norm and RoPE of the new token's q and k, and writing its k and v to the cache,
are part of it. Many new tokens (a prompt or a chunk of one) are flash attention, arXiv 2307.08691, with a
program for each 128 queries of a head.

D is the size of a head, WIDE the power of two that it is padded to; columns past D are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.fused import (
    CODES,
    LARGEST,
    TRITON_TYPES,
    begin,
    code,
    early_start,
    encode_rows,
    interpreted,
    parts_of,
    rotate_and_store,
    rounded,
    summed_parts,
    token_scale,
    weighted,
)
from tinier.kernels.reference import LONG_CONTEXT, Cache, HeadInputs, PagedBatch
from tinier.numerics import Quantized

_LOG2_E = 1.4426950408889634


def _byte_asm(odd: int, *, floats: bool) -> tl.constexpr:
    """Two 16-bit pairs of codes to the first or second code of each, as a pair of float16."""
    if floats:
        body = f"prmt.b32 t, $1, $1, 0x00{'31' if odd else '20'};\ncvt.u16.u32 h, t;\n"
        return tl.constexpr(
            "{\n.reg .b32 t;\n.reg .b16 h;\n" + body + "cvt.rn.f16x2.e4m3x2 $0, h;\n}"
        )
    # the byte, its sign turned, is the mantissa of 1024 as float16; 1152 is taken away
    return tl.constexpr(
        "{\n.reg .b32 t, c, less;\nmov.b32 c, 0x64646464;\nmov.b32 less, 0x64806480;\n"
        f"prmt.b32 t, $1, c, 0x{'4341' if odd else '4240'};\n"
        "xor.b32 t, t, 0x00800080;\nsub.f16x2 $0, t, less;\n}"
    )


_FLOAT_EVEN, _FLOAT_ODD = (_byte_asm(odd, floats=True) for odd in (0, 1))
_INT_EVEN, _INT_ODD = (_byte_asm(odd, floats=False) for odd in (0, 1))


@triton.jit  # type: ignore[untyped-decorator]
def _even(pairs, INTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first code of each 16-bit pair, as float16."""
    ASM: tl.constexpr = _INT_EVEN if INTS else _FLOAT_EVEN
    return tl.inline_asm_elementwise(ASM, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit  # type: ignore[untyped-decorator]
def _odd(pairs, INTS: tl.constexpr):  # type: ignore[no-untyped-def]
    ASM: tl.constexpr = _INT_ODD if INTS else _FLOAT_ODD
    return tl.inline_asm_elementwise(ASM, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _split_pairs(x):  # type: ignore[no-untyped-def]
    """[n, D] to its even and its odd columns, each [n, D/2]."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit  # type: ignore[untyped-decorator]
def _columns(inside, d, SIZE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A mask over rows, and over columns where there are more than SIZE."""
    if SIZE == WIDE:
        return inside
    else:
        return inside & (d < SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def _cached(  # type: ignore[no-untyped-def]
    cache, slot, head, d, inside, K: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    rows = tl.load(
        cache + (slot[:, None] * K + head) * D + d[None, :],
        mask=_columns(inside[:, None], d[None, :], D, WIDE),
        other=0.0,
    )
    return rows.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _turned(  # type: ignore[no-untyped-def]
    qkv, at, heads, inside, cos, sin, norm, eps, stride, D: tl.constexpr, R: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Heads [n, 1] of the token at `at`, normed and rotated [n, WIDE] (reference.split_heads)."""
    d = tl.arange(0, WIDE)[None, :]
    inside = _columns(inside, d, D, WIDE)
    there = _columns(d >= 0, d, D, WIDE)
    other = (d + R // 2) % R
    turning = there
    if R < D:
        turning = d < R
        other = tl.where(turning, other, d)
    x = summed_parts(qkv, at + heads * D + d, inside, stride, PARTS, dtype)
    y = summed_parts(qkv, at + heads * D + other, inside, stride, PARTS, dtype)
    if NORM:
        turn = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        kept: tl.constexpr = norm.dtype.element_ty
        w = tl.load(norm + d, mask=there, other=0.0).to(tl.float32)
        x = weighted(x * turn, w, kept, dtype)
        y = weighted(
            y * turn, tl.load(norm + other, mask=there, other=0.0).to(tl.float32), kept, dtype
        )
    wide: tl.constexpr = cos.dtype.element_ty
    y = rounded(y * tl.load(sin + d, mask=turning, other=0.0).to(tl.float32), wide)
    x = rounded(x * tl.load(cos + d, mask=turning, other=1.0).to(tl.float32), wide)
    return (x + tl.where(d < R // 2, -y, y)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    qkv, cos, sin, positions, slots, q_norm, k_norm, eps, k_cache, v_cache, k_pairs, v_pairs,
    tables, contexts, decodes, k_scale, v_scale, out, sums, stride, width, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
    CODED: tl.constexpr, PAIRED: tl.constexpr, MIXED: tl.constexpr, dtype: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    if MIXED:  # noqa: SIM102
        if sequence >= tl.load(decodes):
            return
    head = tl.program_id(1)
    split = tl.program_id(2)
    before = tl.load(contexts + sequence) - 1  # tokens that are in the cache already
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(0, before + 1 - WINDOW)
    share = tl.cdiv(tl.cdiv(before - oldest, KEYS), SPLITS) * KEYS
    first = oldest + split * share
    end = tl.minimum(before, first + share)
    d = tl.arange(0, WIDE)
    row = tl.arange(0, ROWS)
    inside = (row < GROUP)[:, None]
    at = sequence * (H + 2 * K) * D
    position = tl.load(positions + sequence)
    cos += position * R
    sin += position * R
    queries = _turned(
        qkv, at, (head * GROUP + row)[:, None], inside, cos, sin, q_norm, eps, stride, D, R, WIDE,
        PARTS, NORM, dtype,
    )  # fmt: skip
    if CODED:
        scale = scale * tl.load(k_scale)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDE], tl.float32)
    if split == 0:  # the new token itself
        one = tl.arange(0, 1)[:, None]
        always = one == 0
        stored_columns = _columns(always, d[None, :], D, WIDE)
        key = _turned(
            qkv, at, one + H + head, always, cos, sin, k_norm, eps, stride, D, R, WIDE, PARTS, NORM,
            dtype,
        )  # fmt: skip
        value = summed_parts(
            qkv, at + (H + K + head) * D + one + d[None, :], stored_columns, stride, PARTS, dtype
        ).to(dtype)
        if CODED:
            stored: tl.constexpr = k_cache.dtype.element_ty
            steps = tl.zeros([1, WIDE], tl.float32)
            key = code(tl.div_rn(key.to(tl.float32), steps + tl.load(k_scale)), stored)
            value = code(tl.div_rn(value.to(tl.float32), steps + tl.load(v_scale)), stored)
        slot = tl.load(slots + sequence).to(tl.int64)
        tl.store(k_cache + (slot * K + head) * D + one + d[None, :], key, mask=stored_columns)
        tl.store(v_cache + (slot * K + head) * D + one + d[None, :], value, mask=stored_columns)
        top = tl.sum(queries.to(tl.float32) * key.to(tl.float32), axis=1) * scale
        total += 1.0
        result += value.to(tl.float32)
    # 8-bit codes are read as 16-bit pairs, which the tensor core's operands are made of: even and odd
    # columns are multiplied apart
    if PAIRED:
        INTS: tl.constexpr = k_cache.dtype.element_ty == tl.int8
        half = tl.arange(0, WIDE // 2)
        q_even, q_odd = _split_pairs(queries.to(tl.float16))
        even, odd = _split_pairs(result)
    for start in range(first, end, KEYS):
        place = start + tl.arange(0, KEYS)
        seen = place < end
        block = tl.load(tables + sequence * width + place // BLOCK_SIZE, mask=seen, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE
        if PAIRED:
            at_pairs = (slot[:, None] * K + head) * (D // 2) + half[None, :]
            columns = _columns(seen[:, None], half[None, :], D // 2, WIDE // 2)
            keys = tl.trans(tl.load(k_pairs + at_pairs, mask=columns, other=0))
            values = tl.load(v_pairs + at_pairs, mask=columns, other=0)
            scores = tl.dot(q_even, _even(keys, INTS))
            scores = tl.dot(q_odd, _odd(keys, INTS), scores) * scale
        else:
            keys = _cached(k_cache, slot, head, d, seen, K, D, WIDE, dtype)
            values = _cached(v_cache, slot, head, d, seen, K, D, WIDE, dtype)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, axis=1)
        if PAIRED:
            shares = weights.to(tl.float16)
            even = tl.dot(shares, _even(values, INTS), even * fade[:, None])
            odd = tl.dot(shares, _odd(values, INTS), odd * fade[:, None])
        else:
            result = result * fade[:, None]
            result += tl.dot(weights.to(dtype), values, input_precision="ieee")
        top = higher
    if PAIRED:
        result = tl.reshape(tl.join(even, odd), (ROWS, WIDE))
    if CODED:
        result = result * tl.load(v_scale)
    total = tl.where(total == 0.0, 1.0, total)  # a part without keys; its `top` says so
    result = result / total[:, None]
    to = (sequence * SPLITS + split) * H + head * GROUP + row
    tl.store(
        out + to[:, None] * D + d[None, :],
        result.to(out.dtype.element_ty),
        mask=_columns(inside, d[None, :], D, WIDE),
    )
    if SPLITS > 1:
        tl.store(sums + to, top + tl.log2(total), mask=row < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    partial, sums, decodes, out, scales, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, SPLITS: tl.constexpr, MIXED: tl.constexpr, dtype: tl.constexpr, TAKES: tl.constexpr,
    LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's partial results, weighted by their shares of the softmax's sum, for the next layer."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    if MIXED:  # noqa: SIM102
        if row >= tl.load(decodes):
            return
    head = tl.arange(0, HEADS)
    inside = head < H
    d = tl.arange(0, WIDE)[None, :]
    at = head[:, None] * D + d
    columns = _columns(inside[:, None], d, D, WIDE)
    partial += row * SPLITS * H * D
    sums += row * SPLITS * H
    # the first part has the new token, so its sum is never 0
    top = tl.load(sums + head, mask=inside, other=0.0)
    total = tl.full([HEADS], 1.0, tl.float32)
    joined = tl.load(partial + at, mask=columns, other=0.0)
    for split in tl.static_range(1, SPLITS):
        log = tl.load(sums + split * H + head, mask=inside, other=0.0)
        part = tl.load(partial + split * H * D + at, mask=columns, other=0.0)
        higher = tl.maximum(top, log)
        fade, weight = tl.exp2(top - higher), tl.exp2(log - higher)
        joined = joined * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = higher
    y = (joined / total[:, None]).to(dtype)
    if TAKES is None:
        tl.store(out + row * H * D + at, y, mask=columns)
    else:
        y = y.to(tl.float32)
        scale = token_scale(tl.max(tl.max(tl.abs(y), axis=1), axis=0), LARGEST)
        y = code(y * tl.div_rn(1.0, scale), out.dtype.element_ty)
        tl.store(out + row * H * D + at, y, mask=columns)
        tl.store(scales + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _prefill(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, tables, contexts, starts, decodes, k_scale, v_scale, out, width, scale,
    sequences, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr,
    WINDOW: tl.constexpr, CODED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    # the launch knows how many tiles there can be, not whose: the same graph serves every batch
    each = tl.arange(0, SEQUENCES)
    begins = tl.load(starts + each, mask=each < sequences, other=0)
    counts = tl.load(starts + each + 1, mask=each < sequences, other=0) - begins
    tiles = tl.where(each < tl.load(decodes), 0, tl.cdiv(counts, QUERIES))
    until = tl.cumsum(tiles, axis=0)
    # last tiles first: they see the most keys
    place = tl.sum(tiles, axis=0) - 1 - tl.program_id(0)
    if place < 0:
        return
    sequence = tl.sum((until <= place).to(tl.int32), axis=0)
    tile = place - tl.sum(tl.where(each == sequence, until - tiles, 0), axis=0)
    sequence = sequence.to(tl.int64)
    head = tl.program_id(1)
    start = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    context = tl.load(contexts + sequence)
    row = tile * QUERIES + tl.arange(0, QUERIES)
    asks = context - count + row
    d = tl.arange(0, WIDE)
    dtype = q.dtype.element_ty
    at = ((start + row)[:, None] * H + head) * D + d[None, :]
    inside_rows = _columns(row[:, None] < count, d[None, :], D, WIDE)
    queries = tl.load(q + at, mask=inside_rows, other=0.0)
    # 8-bit codes become float16 at half the cost of bfloat16, and exactly
    mult: tl.constexpr = tl.float16 if CODED and dtype == tl.bfloat16 else dtype
    queries = queries.to(mult)
    if CODED:
        scale = scale * tl.load(k_scale)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(0, context - count + tile * QUERIES - WINDOW + 1) // KEYS * KEYS
    end = tl.minimum(context, context - count + (tile + 1) * QUERIES)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDE], tl.float32)
    for first_key in range(oldest, end, KEYS):
        position = first_key + tl.arange(0, KEYS)
        inside = position < end
        block = tl.load(tables + sequence * width + position // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        keys = _cached(k_cache, slot, head // (H // K), d, inside, K, D, WIDE, mult)
        values = _cached(v_cache, slot, head // (H // K), d, inside, K, D, WIDE, mult)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        visible = position[None, :] <= asks[:, None]
        if WINDOW > 0:
            visible = visible & (position[None, :] > asks[:, None] - WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # the first tile of a window may hide all keys from a query
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, axis=1)
        result = result * fade[:, None] + tl.dot(weights.to(mult), values, input_precision="ieee")
        top = higher
    if CODED:
        result = result * tl.load(v_scale)
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]  # rows past the last query
    tl.store(out + at, result.to(dtype), mask=inside_rows)


def cached_attention(
    qkv: Tensor, inputs: HeadInputs, cache: Cache, batch: PagedBatch, takes: str | None = None
) -> Tensor | Quantized:
    """As operators.cached_attention; sequences with one new token stand first in the batch."""
    if max(batch.counts) == 1:
        return _decode_all(qkv, inputs, cache, batch, takes)
    q = rotate_and_store(
        qkv, inputs.rotation, batch.positions, batch.slots, inputs.norms, inputs.eps, inputs.heads,
        inputs.dtype, cache.keys, cache.values, cache.scales,
    )  # fmt: skip
    out = torch.empty_like(q).flatten(1)
    # sequences of one new token once more: their k and v are written twice, and are the same
    _decode_all(qkv, inputs, cache, batch, None, out)
    prefill_attention(q, cache, batch, out, inputs.scale)
    return out if takes is None else encode_rows(out, takes)


def _decode_all(
    qkv: Tensor, inputs: HeadInputs, cache: Cache, batch: PagedBatch, takes: str | None,
    mixed: Tensor | None = None,
) -> Tensor | Quantized:  # fmt: skip
    """One new token of each sequence; or of the first `batch.decodes`, to the first rows of `mixed`."""
    _, kv_heads, size = cache.keys.shape
    tokens = len(batch.counts)
    heads, dtype = inputs.heads, inputs.dtype
    # of a mixed batch's sequences any number may be such
    splits = _splits((tokens if mixed is None else min(tokens, 16)) * kv_heads, batch.longest)
    if splits == 1 and mixed is not None:
        out = mixed
    else:
        out = torch.empty(
            tokens, splits, heads, size, dtype=torch.float32 if splits > 1 else dtype,
            device=qkv.device,
        )  # fmt: skip
    sums = torch.empty(tokens, splits, heads, dtype=torch.float32, device=qkv.device)
    q_norm, k_norm = inputs.norms or (out, out)
    k_scale, v_scale = cache.scales or (out, out)
    group = heads // kv_heads
    # half a head is the inner side of a product, which tensor cores take from 16 on
    can_pair = dtype == torch.bfloat16 and size >= 32 and not interpreted()
    paired = cache.scales is not None and can_pair
    pairs = [t.view(torch.int16) if paired else t for t in (cache.keys, cache.values)]
    _decode[(tokens, kv_heads, splits)](
        qkv, *inputs.rotation, batch.positions, batch.slots, q_norm, k_norm, inputs.eps, cache.keys,
        cache.values, *pairs, batch.tables, batch.contexts, batch.decodes, k_scale, v_scale, out, sums,
        qkv.shape[-2] * qkv.shape[-1], batch.tables.stride(0), (inputs.scale or size**-0.5) * _LOG2_E,
        H=heads, K=kv_heads, D=size, R=inputs.rotation[0].shape[1], WIDE=_wide(size), GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK_SIZE=batch.block_size, KEYS=_KEYS, SPLITS=splits, WINDOW=cache.window or 0,
        PARTS=parts_of(qkv), NORM=inputs.norms is not None, CODED=cache.scales is not None,
        PAIRED=paired, MIXED=mixed is not None, dtype=TRITON_TYPES[dtype], num_warps=_WARPS,
        num_stages=_STAGES, **early_start(),
    )  # fmt: skip
    if splits == 1:
        whole = out.view(-1, heads * size)
        return whole if takes is None else encode_rows(whole, takes)
    joined = mixed
    if joined is None:
        coded = CODES.get(takes or "", dtype)
        joined = torch.empty(tokens, heads * size, dtype=coded, device=qkv.device)
    scales = torch.empty(tokens if takes else 0, 1, dtype=torch.float32, device=qkv.device)
    _join[(tokens,)](
        out, sums, batch.decodes, joined, scales, H=heads, HEADS=triton.next_power_of_2(heads), D=size,
        WIDE=_wide(size),
        SPLITS=splits, MIXED=mixed is not None, dtype=TRITON_TYPES[dtype], TAKES=takes,
        LARGEST=LARGEST.get(takes or "", 0.0), num_warps=16, **early_start(),
    )  # fmt: skip
    return joined if takes is None else Quantized(joined, scales)


def prefill_attention(
    q: Tensor, cache: Cache, batch: PagedBatch, out: Tensor, scale: float | None = None
) -> None:
    """Causal attention of q [T, H, D] over the cache, which has its keys, to out [T, H·D]; the first
    `batch.decodes` sequences are left out. scale: as HeadInputs'."""
    tokens, heads, size = q.shape
    sequences = len(batch.counts)
    kv_heads = cache.keys.shape[1]
    k_scale, v_scale = cache.scales or (q, q)
    queries = 128 if q.dtype != torch.float32 else 32
    # a sequence fills all its tiles but the last
    most = tokens // queries + min(sequences, tokens // 2)
    _prefill[(most, heads)](
        q, cache.keys, cache.values, batch.tables, batch.contexts, batch.starts, batch.decodes, k_scale,
        v_scale, out, batch.tables.stride(0), (scale or size**-0.5) * _LOG2_E, sequences, H=heads,
        K=kv_heads,
        D=size, WIDE=_wide(size), BLOCK_SIZE=batch.block_size, QUERIES=queries,
        KEYS=64 if queries == 128 else 32, SEQUENCES=triton.next_power_of_2(sequences),
        WINDOW=cache.window or 0, CODED=cache.scales is not None, num_warps=8, num_stages=2,
        **early_start(),
    )  # fmt: skip


def _wide(size: int) -> int:
    """What a head's size is padded to: a power of two, and 16 at least, which tensor cores want."""
    return max(16, int(triton.next_power_of_2(size)))


# of a decode program; the fastest of five for FP8 and bf16 caches (docs/log.md)
_KEYS, _WARPS, _STAGES = 64, 4, 3


def _splits(programs: int, longest: int) -> int:
    """Parts of each context, so that about one program runs on each of 132 processors; a long context can
    use more, a short one has not enough keys."""
    wanted: int = triton.next_power_of_2(triton.cdiv(132, programs))
    return min(8, wanted) if longest < LONG_CONTEXT else min(32, 2 * wanted)
