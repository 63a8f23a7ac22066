"""Attention over the paged KV cache in Triton. Plain torch: reference.paged_attention.

One new token of a sequence (decode) reads its whole context, so the context is split over programs
whose partial results a second kernel joins (flash decoding); the query heads of one KV head are the
rows of one matrix product. Many new tokens (a prompt or a chunk of one) are flash attention, arXiv
2307.08691, with a program for each 128 queries of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.reference import PagedBatch

_DECODE_KEYS = 64
_LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def _cached(cache, slot, head, d, inside, K: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.load(
        cache + (slot[:, None] * K + head) * D + d[None, :], mask=inside[:, None], other=0.0
    )
    return rows.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, tables, contexts, k_scale, v_scale, partial, sums, width, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(contexts + sequence)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(0, context - WINDOW)
    share = tl.cdiv(tl.cdiv(context - oldest, KEYS), SPLITS) * KEYS
    begin = oldest + split * share
    end = tl.minimum(context, begin + share)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    dtype = q.dtype.element_ty
    queries = tl.load(
        q + (sequence * H + head * GROUP + row[:, None]) * D + d[None, :],
        mask=row[:, None] < GROUP, other=0.0,
    )  # fmt: skip
    if CODED:
        scale = scale * tl.load(k_scale)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        inside = position < end
        block = tl.load(tables + sequence * width + position // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        keys = _cached(k_cache, slot, head, d, inside, K, D, dtype)
        values = _cached(v_cache, slot, head, d, inside, K, D, dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, axis=1)
        out = out * fade[:, None] + tl.dot(weights.to(dtype), values, input_precision="ieee")
        top = higher
    if CODED:
        out = out * tl.load(v_scale)
    total = tl.where(total == 0.0, 1.0, total)  # a part without keys; its `top` says so
    out = out / total[:, None]
    at = (sequence * H + head * GROUP + row) * SPLITS + split
    tl.store(
        partial + at[:, None] * D + d[None, :],
        out.to(partial.dtype.element_ty),
        mask=row[:, None] < GROUP,
    )
    if SPLITS > 1:
        tl.store(sums + at, top + tl.log2(total), mask=row < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _join(partial, sums, out, D: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A head's partial results, weighted by their shares of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    logs = tl.load(sums + row * SPLITS + split)
    # a padded row of a captured batch has no context at all
    top = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    parts = tl.load(partial + (row * SPLITS + split[:, None]) * D + d[None, :])
    joined = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + d, joined.to(out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _prefill(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, tables, contexts, starts, k_scale, v_scale, out, width, scale, first,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = (tl.program_id(2) + first).to(tl.int64)
    start = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    if tile * QUERIES >= count:
        return
    context = tl.load(contexts + sequence)
    row = tile * QUERIES + tl.arange(0, QUERIES)
    asks = context - count + row
    d = tl.arange(0, D)
    dtype = q.dtype.element_ty
    at = ((start + row)[:, None] * H + head) * D + d[None, :]
    queries = tl.load(q + at, mask=row[:, None] < count, other=0.0)
    if CODED:
        scale = scale * tl.load(k_scale)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(0, context - count + tile * QUERIES - WINDOW + 1) // KEYS * KEYS
    end = tl.minimum(context, context - count + (tile + 1) * QUERIES)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, D], tl.float32)
    for begin in range(oldest, end, KEYS):
        position = begin + tl.arange(0, KEYS)
        inside = position < end
        block = tl.load(tables + sequence * width + position // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        keys = _cached(k_cache, slot, head // (H // K), d, inside, K, D, dtype)
        values = _cached(v_cache, slot, head // (H // K), d, inside, K, D, dtype)
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
        result = result * fade[:, None] + tl.dot(weights.to(dtype), values, input_precision="ieee")
        top = higher
    if CODED:
        result = result * tl.load(v_scale)
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]  # rows past the last query
    tl.store(out + at, result.to(dtype), mask=row[:, None] < count)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, window: int | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As reference.paged_attention; sequences with one new token stand first in the batch."""
    _, heads, size = q.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(q)
    k_scale, v_scale = scales or (q, q)
    scale = size**-0.5 * _LOG2_E
    decodes = next((i for i, n in enumerate(batch.counts) if n > 1), len(batch.counts))
    if decodes:
        splits = _splits(decodes * kv_heads)
        partial, sums = out, out
        if splits > 1:
            shape = (decodes, heads, splits, size)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
            sums = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        group = heads // kv_heads
        _decode[(decodes, kv_heads, splits)](
            q, keys, values, batch.tables, batch.contexts, k_scale, v_scale, partial, sums,
            batch.tables.stride(0), scale, H=heads, K=kv_heads, D=size, GROUP=group,
            ROWS=max(16, triton.next_power_of_2(group)), BLOCK_SIZE=batch.block_size,
            KEYS=_DECODE_KEYS, SPLITS=splits, WINDOW=window or 0, CODED=scales is not None,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            _join[(decodes * heads,)](partial, sums, out, D=size, SPLITS=splits, num_warps=1)
    if decodes < len(batch.counts):
        queries = 128 if q.dtype != torch.float32 else 32
        grid = (triton.cdiv(max(batch.counts), queries), heads, len(batch.counts) - decodes)
        _prefill[grid](
            q, keys, values, batch.tables, batch.contexts, batch.starts, k_scale, v_scale, out,
            batch.tables.stride(0), scale, decodes, H=heads, K=kv_heads, D=size,
            BLOCK_SIZE=batch.block_size, QUERIES=queries, KEYS=64 if queries == 128 else 32,
            WINDOW=window or 0, CODED=scales is not None, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out


def _splits(programs: int) -> int:
    """Parts of each context, so that two programs or more run on each of about 132 processors."""
    wanted: int = triton.next_power_of_2(triton.cdiv(264, programs))
    return min(32, wanted)
