"""The next tokens: the likeliest in two small kernels, or drawn by temperature in three. Plain torch:
reference.py and engine/drawing.py, whose text says how.

The noise is the same function in `draw` and in `noise`, so a request's token does not depend on whether
others in its batch have limits that `draw` does not know.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.fused import begin, early_start

_BLOCK = 1024


@triton.jit
def _numbers(logits, allowed, row, at, last, size, words):  # type: ignore[no-untyped-def]
    """A row's logits in float32; NaN counts as the Inf that it comes from. allowed: words of bits, of what
    may come (`draw`); the others are -inf, but for those that are no numbers."""
    inside = at < last
    value = tl.load(logits + row * size + at, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.where(value != value, float("inf"), value)
    if allowed is not None:
        word = tl.load(allowed + row * words + at // 32, mask=inside, other=0)
        is_kept = (((word >> (at % 32)) & 1) == 1) | (value == float("inf"))
        value = tl.where(is_kept, value, -float("inf"))
    return value


@triton.jit
def _store_best(best, place, values, places):  # type: ignore[no-untyped-def]
    """The largest of [BLOCK] numbers and its place, of equal ones the first, at this program's own."""
    top = tl.max(best, axis=0)
    to = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + to, top)
    tl.store(places + to, tl.min(tl.where(best == top, place, 2**31 - 1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _largest(  # type: ignore[no-untyped-def]
    logits, allowed, values, places, size, words, share, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """The largest of one row's share of the vocabulary, and where it is. See `_numbers`."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(size, first + share)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.full([BLOCK], 2**31 - 1, tl.int32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = _numbers(logits, allowed, row, at, last, size, words)
        better = value > best
        best = tl.where(better, value, best)
        place = tl.where(better, at, place)
    _store_best(best, place, values, places)


@triton.jit  # type: ignore[untyped-decorator]
def _largest_of(  # type: ignore[no-untyped-def]
    values, places, seats, tokens, sampled, PARTS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(values + row * PARTS + part)
    place = tl.load(places + row * PARTS + part)
    top = tl.max(value, axis=0)
    token = tl.min(tl.where(value == top, place, 2**31 - 1), axis=0).to(tl.int64)
    token = tl.where(tl.abs(top) == float("inf"), -1, token)  # no numbers
    tl.store(tokens + row, token)
    if seats is not None:
        tl.store(sampled + tl.load(seats + row), tl.maximum(token, 0))


@triton.jit
def _scrambled(bits):  # type: ignore[no-untyped-def]
    """int32 through the finalizer of MurmurHash3."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387
    return bits ^ ((bits >> 16) & 0xFFFF)


@triton.jit
def _noise_of(tokens, mix, add):  # type: ignore[no-untyped-def]
    """Of Gumbel's distribution, for int32 tokens and a row's two keys."""
    bits = _scrambled((_scrambled(tokens * -1640531527) * mix) ^ add)
    below = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * (2.0**-31)
    below = tl.minimum(below, 1 - 2.0**-24)
    rest = 1 - below
    # -log(1 - below), exact for small numbers too
    wait = tl.where(rest == 1, below, -tl.log(rest) * tl.div_rn(below, 1 - rest))
    return -tl.log(wait)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    logits, allowed, tops, temperatures, keys, values, places, size, words, share, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest of (logit - top) / temperature + noise in one row's share, and where it is."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(size, first + share)
    top = tl.max(tl.load(tops + row * PARTS + tl.arange(0, PARTS)), axis=0)
    is_bad = tl.abs(top) == float("inf")
    top = tl.where(is_bad, 0.0, top)
    temperature = tl.load(temperatures + row)
    mix, add = tl.load(keys + 2 * row) | 1, tl.load(keys + 2 * row + 1)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.full([BLOCK], 2**31 - 1, tl.int32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = _numbers(logits, allowed, row, at, last, size, words)
        is_kept = tl.abs(value) < float("inf")
        gap = top - tl.where(is_kept, value, top)
        score = _noise_of(at, mix, add) - tl.div_rn(gap, temperature)
        score = tl.where(is_kept, score, -float("inf"))
        better = score > best
        best = tl.where(better, score, best)
        place = tl.where(better, at, place)
    _store_best(tl.where(is_bad, float("inf"), best), place, values, places)


@triton.jit  # type: ignore[untyped-decorator]
def _noise(keys, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mix, add = tl.load(keys + 2 * row) | 1, tl.load(keys + 2 * row + 1)
    tl.store(out + row * size + at, _noise_of(at, mix, add), mask=at < size)


def greedy(logits: Tensor, seats: Tensor, sampled: Tensor) -> Tensor:
    """The likeliest token of each row of logits [B, vocab], [B] int64; written to sampled[seats] too."""
    rows, size = logits.shape
    parts = 32 if rows <= 16 else 8
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _largest[(rows, parts)](
        logits,
        None,
        values,
        places,
        size,
        0,
        triton.cdiv(size, parts),
        BLOCK=2048,
        num_warps=8,
        **early_start(),
    )
    _largest_of[(rows,)](
        values, places, seats, tokens, sampled, PARTS=parts, num_warps=1, **early_start()
    )
    return tokens


def draw(
    logits: Tensor, temperatures: Tensor, row_keys: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """A token of each row by its probability at its temperature, [R] int64; -1 for one with NaN or Inf,
    or of which nothing is allowed.

    logits: [R, vocab]; temperatures: [R, 1] float32; row_keys: [R, 2] int32, of drawing.keys; allowed:
    [R, words] int32, a bit for each token that may come, the lowest first; None: all may.
    """
    rows, size = logits.shape
    parts = 32 if rows <= 16 else 8
    share = triton.cdiv(size, parts)
    words = 0 if allowed is None else allowed.shape[1]
    tops, values = logits.new_empty(2, rows, parts, dtype=torch.float32)
    places = logits.new_empty(rows, parts, dtype=torch.int32)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    _largest[(rows, parts)](
        logits, allowed, tops, places, size, words, share, BLOCK=_BLOCK, **early_start()
    )
    _draw[(rows, parts)](
        logits, allowed, tops, temperatures, row_keys, values, places, size, words, share,
        PARTS=parts, BLOCK=_BLOCK, **early_start(),
    )  # fmt: skip
    _largest_of[(rows,)](
        values, places, None, tokens, None, PARTS=parts, num_warps=1, **early_start()
    )
    return tokens


def noise(row_keys: Tensor, vocab: int) -> Tensor:
    """[R, vocab] float32 of Gumbel's distribution: engine/drawing.noise."""
    rows = len(row_keys)
    out = torch.empty(rows, vocab, dtype=torch.float32, device=row_keys.device)
    grid = (rows, triton.cdiv(vocab, _BLOCK))
    _noise[grid](row_keys, out, vocab, BLOCK=_BLOCK, **early_start())
    return out
