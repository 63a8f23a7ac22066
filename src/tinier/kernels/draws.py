"""Tokens drawn by temperature in three small kernels. Plain torch: engine/drawing.py, whose text says how.

The noise is the same function in `draw` and in `noise`, so a request's token does not depend on whether
others in its batch have limits that `draw` does not know.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.fused import begin, early_start, largest, largest_of, numbers, store_best

_BLOCK = 1024


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
        value = numbers(logits, allowed, row, at, last, size, words)
        is_kept = tl.abs(value) < float("inf")
        gap = top - tl.where(is_kept, value, top)
        score = _noise_of(at, mix, add) - tl.div_rn(gap, temperature)
        score = tl.where(is_kept, score, -float("inf"))
        better = score > best
        best = tl.where(better, score, best)
        place = tl.where(better, at, place)
    store_best(tl.where(is_bad, float("inf"), best), place, values, places)


@triton.jit  # type: ignore[untyped-decorator]
def _noise(keys, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mix, add = tl.load(keys + 2 * row) | 1, tl.load(keys + 2 * row + 1)
    tl.store(out + row * size + at, _noise_of(at, mix, add), mask=at < size)


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
    largest[(rows, parts)](
        logits, allowed, tops, places, size, words, share, BLOCK=_BLOCK, **early_start()
    )
    _draw[(rows, parts)](
        logits, allowed, tops, temperatures, row_keys, values, places, size, words, share,
        PARTS=parts, BLOCK=_BLOCK, **early_start(),
    )  # fmt: skip
    largest_of[(rows,)](
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
