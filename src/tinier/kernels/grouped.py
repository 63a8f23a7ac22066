"""A mixture's experts in Triton: each token times the weights of the few experts that it chose.

The pairs of a token and one of its experts are sorted by expert (`route`), and a program multiplies a tile
of an expert's rows with up to `Routing.most` of its tokens, as skinny.py does with all tokens. An expert
that no token chose is not read. What a step launches depends on the number of tokens alone, so that it
can be a CUDA graph. Plain torch: `reference.through_experts`.

T tokens, E experts, C of them chosen by each token, P = T · C pairs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.fused import TRITON_TYPES, begin, early_start, parts_of, summed_parts
from tinier.kernels.reference import joined, shares_of
from tinier.kernels.skinny import MOST_TOKENS, Weight, int4_chunk, multiply, tile
from tinier.numerics import Quantized

# logits [T, E] that one program holds
_MOST_LOGITS = 16_384


class Routing(NamedTuple):
    """Which tokens go to which expert. Slots are pairs, sorted by expert."""

    tokens: Tensor
    """[P] int32: the token in each slot"""
    parts: Tensor
    """[P] int32: choice · T + token, the row of what the experts make"""
    shares: Tensor
    """[P] float32: what the expert's output is multiplied with"""
    blocks: Tensor
    """[B, 3] int32: an expert, its first slot and the one behind its last, up to `most` of them; expert -1:
    there is no such block"""
    most: int
    num_tokens: int


@triton.jit(do_not_specialize=["T", "count"])  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    logits, tokens, parts, shares, blocks, T, stride, count, E: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr, MOST: tl.constexpr,
    BLOCKS: tl.constexpr, SUMS_TO_ONE: tl.constexpr, stored: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    t = tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, EXPERTS)[None, :]
    inside = (t < T) & (e < E)
    x = summed_parts(logits, t * E + e, inside, stride, PARTS, stored)
    x = tl.where(x != x, 0.0, x)  # whatever is chosen then, its outputs are no numbers either
    x = tl.where(e < E, tl.clamp(x, -1e30, 1e30), -float("inf"))
    likely = tl.exp(x - tl.max(x, axis=1)[:, None])
    likely = likely / tl.sum(likely, axis=1)[:, None]
    # which choice of the token each expert is
    choice = tl.full([ROWS, EXPERTS], CHOSEN, tl.int32)
    left = tl.where(e < E, likely, -1.0)
    for i in tl.static_range(CHOSEN):
        best = tl.max(left, axis=1)[:, None]
        first = tl.min(tl.where(left == best, e, EXPERTS), axis=1)[:, None]
        choice = tl.where(e == first, i, choice)
        left = tl.where(e == first, -1.0, left)
    share = tl.where(choice < CHOSEN, likely, 0.0)
    if SUMS_TO_ONE:
        share = share / tl.sum(share, axis=1)[:, None]
    picked = (choice < CHOSEN) & inside
    picks = picked.to(tl.int32)
    size = tl.sum(picks, axis=0)[None, :]
    begun = tl.cumsum(size, axis=1) - size
    slot = begun + tl.cumsum(picks, axis=0) - picks
    tl.store(tokens + slot, t + tl.zeros_like(slot), mask=picked)
    tl.store(parts + slot, choice * T + t, mask=picked)
    tl.store(shares + slot, share, mask=picked)
    needed = (size + MOST - 1) // MOST
    place = tl.cumsum(needed, axis=1) - needed
    for i in range(tl.cdiv(T, MOST)):
        at = blocks + (place + i) * 3
        tl.store(at, e, mask=i < needed)
        tl.store(at + 1, begun + i * MOST, mask=i < needed)
        tl.store(at + 2, tl.minimum(begun + size, begun + i * MOST + MOST), mask=i < needed)
    rest = tl.arange(0, BLOCKS)
    tl.store(blocks + rest * 3, -1, mask=(rest >= tl.sum(needed)) & (rest < count))


def route(logits: Tensor, chosen: int, *, sums_to_one: bool, dtype: torch.dtype) -> Routing:
    """Where the tokens go, by the router's logits [T, E] in dtype, or their parts [S, T, E] in float32.

    The shares are the softmax over all experts; sums_to_one: divided by the sum of those chosen.
    """
    tokens, experts = logits.shape[-2:]
    pairs = tokens * chosen
    most = _block_size(pairs, experts)
    count = (pairs + min(experts, pairs) * (most - 1)) // most
    if tokens * experts > _MOST_LOGITS or tokens > MOST_TOKENS:
        return _route_many(joined(logits, dtype), chosen, most, count, sums_to_one=sums_to_one)
    ints = torch.empty(2 * pairs + 3 * count, dtype=torch.int32, device=logits.device)
    found = Routing(
        ints[:pairs], ints[pairs : 2 * pairs],
        torch.empty(pairs, dtype=torch.float32, device=logits.device),
        ints[2 * pairs :].view(count, 3), most, tokens,
    )  # fmt: skip
    _route[(1,)](
        logits, *found[:4], tokens, tokens * experts, count, E=experts, CHOSEN=chosen,
        ROWS=triton.next_power_of_2(tokens), EXPERTS=triton.next_power_of_2(experts),
        PARTS=parts_of(logits), MOST=most,
        BLOCKS=triton.next_power_of_2(count), SUMS_TO_ONE=sums_to_one,
        stored=TRITON_TYPES[dtype], num_warps=4 if tokens * experts <= 2048 else 8, **early_start(),
    )  # fmt: skip
    return found


def _block_size(pairs: int, experts: int) -> int:
    """Pairs that are multiplied together: about as many as an expert has."""
    each: int = triton.next_power_of_2(triton.cdiv(pairs, experts))
    return min(128, max(16, each))


def _route_many(
    logits: Tensor, chosen: int, most: int, count: int, *, sums_to_one: bool
) -> Routing:
    """The same in torch, for many tokens."""
    tokens, experts = logits.shape
    shares, picks = shares_of(logits, chosen, sums_to_one=sums_to_one)
    by_expert, order = picks.flatten().sort(stable=True)
    token, choice = order // chosen, order % chosen
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=logits.device), right=True)
    size = ends.diff(prepend=ends.new_zeros(1))
    needed = (size + most - 1) // most
    behind = needed.cumsum(0)
    block = torch.arange(count, device=logits.device)
    expert = torch.searchsorted(behind, block, right=True)
    own = expert.clamp(max=experts - 1)
    first = (ends - size)[own] + (block - (behind - needed)[own]) * most
    last = torch.minimum(ends[own], first + most)
    expert = torch.where(expert < experts, expert, -1)
    blocks = torch.stack((expert, first, last), dim=1).int()
    parts = (choice * tokens + token).int()
    return Routing(token.int(), parts, shares.flatten()[order], blocks, most, tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _slots(block, tokens, T, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slots of a block, the one behind the last, and the row of x in each; T: none."""
    slot = tl.load(block + 1) + tl.arange(0, TOKENS)
    last = tl.load(block + 2)
    if tokens is None:
        return slot, last, tl.where(slot < last, slot, T)
    else:
        return slot, last, tl.load(tokens + slot, mask=slot < last, other=T)


@triton.jit
def _write(acc, parts, shares, out, slot, last, n, N):  # type: ignore[no-untyped-def]
    """acc [rows, tokens] times the tokens' shares, to out [P, N]."""
    row = slot
    if parts is not None:
        there = slot < last
        acc = acc * tl.load(shares + slot, mask=there, other=0.0)[None, :]
        row = tl.load(parts + slot, mask=there, other=0)
    at = out + row.to(tl.int64)[None, :] * N + n[:, None]
    inside = (slot < last)[None, :] & (n < N)[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def _grouped(  # type: ignore[no-untyped-def]
    x, x_scale, codes, scale, out, tokens, parts, shares, blocks, T, N, K,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    block = blocks + tl.program_id(1) * 3
    expert = tl.load(block)
    if expert >= 0:
        slot, last, token = _slots(block, tokens, T, TOKENS)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        own = codes + expert.to(tl.int64) * N * K
        exact: tl.constexpr = x.dtype.element_ty.is_int()
        acc = tl.zeros([BLOCK_N, TOKENS], tl.int32 if exact else tl.float32)
        for at in range(0, K, BLOCK_K):
            w = tile(own, n, at, K, N, K, BLOCK_K, WHOLE)
            acc = multiply(w, x, token, at, K, T, K, acc, BLOCK_K, WHOLE, exact)
        acc = acc.to(tl.float32)
        if scale is not None:
            acc = acc * tl.load(scale + expert * N + n, mask=n < N, other=0.0)[:, None]
        if x_scale is not None:
            acc = acc * tl.load(x_scale + token, mask=token < T, other=0.0)[None, :]
        _write(acc, parts, shares, out, slot, last, n, N)


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def _grouped_int4(  # type: ignore[no-untyped-def]
    x, words, scale, out, tokens, parts, shares, blocks, T, N, K, chunks, rows,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    block = blocks + tl.program_id(1) * 3
    expert = tl.load(block)
    if expert >= 0:
        slot, last, token = _slots(block, tokens, T, TOKENS)
        r = tl.arange(0, BLOCK_N)
        n = tl.program_id(0) * BLOCK_N + r
        own = words + (expert * N + tl.program_id(0) * BLOCK_N).to(tl.int64) // 64 * chunks * 1024
        at = (r // 64 * chunks * 1024 + r % 64 * 16)[:, None] + tl.arange(0, 16)[None, :]
        acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
        for chunk in range(0, chunks):
            w = tl.load(own + at)
            own += 1024
            acc = int4_chunk(
                w, x, scale, expert * N + n, chunk * 128, token, T, rows, K, acc, GROUP, RAGGED
            )
        _write(acc, parts, shares, out, slot, last, n, N)


def fits(weight: Weight, experts: int) -> bool:
    """Whether the rows of all experts, one after the other, can be multiplied here: without bias, and INT4
    in whole tiles of each."""
    rows = weight.shape[0] // experts
    return weight.bias is None and (not weight.group_size or rows % 64 == 0)


def matmul(
    inputs: Tensor | Quantized, weight: Weight, routing: Routing, experts: int, *, last: bool
) -> Tensor:
    """Each pair's row of x times its expert's weight.

    inputs: x, or its codes and their scales, one a row. weight: the rows of all experts, [E · N, K].
    last: x has a row in each slot, [P, K], and the result is times the shares, [C, T, N]: in float32, to be
    summed, for up to 64 tokens, in bf16 for more. Otherwise x has one for each token, [T, K], and the
    result is [P, N] in bf16.
    """
    x, x_scale = (inputs, None) if isinstance(inputs, Tensor) else inputs[:2]
    tokens, pairs = routing.num_tokens, len(routing.tokens)
    rows, columns = weight.shape[0] // experts, weight.shape[1]
    few = routing.most <= 16
    wide = torch.float32 if last and tokens <= MOST_TOKENS else torch.bfloat16
    shape = (pairs // tokens, tokens, rows) if last else (pairs, rows)
    out = torch.empty(shape, dtype=wide, device=x.device)
    where = (None, routing.parts, routing.shares) if last else (routing.tokens, None, None)
    options: dict[str, Any] = {"TOKENS": routing.most, **early_start()}
    if weight.group_size:
        _grouped_int4[(triton.cdiv(rows, 64), len(routing.blocks))](
            x, weight.codes, weight.scale, out, *where, routing.blocks, x.shape[0], rows, columns,
            triton.cdiv(columns, 128), weight.shape[0], GROUP=weight.group_size, BLOCK_N=64,
            RAGGED=columns % 128 != 0, num_warps=4, num_stages=3, **options,
        )  # fmt: skip
        return out
    block_rows = 64 if routing.most <= 32 else 128
    widest = (256 if few else 128) // weight.codes.element_size()
    width = next((w for w in (widest, widest // 2) if columns % w == 0), widest)
    _grouped[(triton.cdiv(rows, block_rows), len(routing.blocks))](
        x, x_scale, weight.codes, weight.scale, out, *where, routing.blocks, x.shape[0], rows,
        columns, BLOCK_N=block_rows, BLOCK_K=width,
        WHOLE=rows % block_rows == 0 and columns % width == 0,
        num_warps=8 if routing.most >= 128 else 4, num_stages=4 if few else 3, **options,
    )  # fmt: skip
    return out
