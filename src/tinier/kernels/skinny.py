"""A linear layer over few tokens (decoding, and INT4's short prompts): reading the weight as it is stored,
once or for 128 tokens each time, is the time.

out[t, n] = Σ_k x[t, k] · w[n, k], in Triton. The weight's rows are the rows of the tensor core's tile and
the tokens its columns, so that one token costs as much as sixteen. Formats: bf16; E4M3 or INT8 codes times
codes of the same kind; E4M3, E5M2 or INT4 codes times bf16. Plain torch: `reference` dequantizes and
multiplies (tests/kernels/test_skinny.py).

- The inner dimension is split over programs where a layer has too few rows to fill the GPU. The parts are
  summed by the operator that reads them anyway (norm, SiLU·mul, attention): `out` is then [splits, T, N]
  in float32.
- On Hopper a kernel starts while the one before it runs (programmatic dependent launch). It asks for its
  weights to be brought to the L2 cache, waits for its input, and then finds them there.
- INT4 codes are stored as words of eight, nibble i of word j of each 128 columns being column 16·i + j, so
  that one nibble of two neighbouring words is one register of the tensor core's operand.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.fused import begin, early_start

MOST_TOKENS = 64
# of INT4: from here on it is faster to expand the weight once for all tokens
MOST_INT4_TOKENS = 384
_INT4_TOKENS = 128  # computed with each reading of a weight, where there are more than 64
_CHUNK = 128  # columns in 16 words of eight INT4 codes
_ROWS = 64  # rows of INT4 that lie together
_MOST_ROWS = 128  # that a program reads: a weight is filled up to them


class Weight(NamedTuple):
    """A weight [N, K] as the kernel reads it."""

    codes: Tensor
    """[N, K] bf16, E4M3, E5M2 or INT8; INT4: [N/64, K/128, 64, 16] int32 (`pack_int4`)"""
    scale: Tensor | None
    """[N] float32; INT4: [K/group, N] bf16"""
    bias: Tensor | None
    """[N]"""
    shape: tuple[int, int]
    """(N, K)"""
    group_size: int = 0
    """Of INT4; 0: not INT4"""


class Tiling(NamedTuple):
    rows: int
    columns: int
    splits: int
    stages: int
    warps: int = 4
    ahead: int = 512
    """Bytes of each row that are brought to the L2 cache before the input is there"""


def pack_int4(codes: Tensor) -> Tensor:
    """INT4 codes [N, K] of -8..7 as words [N/64, K/128, 64, 16], filled up with zeros to whole tiles of any
    `Tiling`."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % _CHUNK, 0, -rows % _MOST_ROWS))
    nibbles = (padded.int() + 8).view(-1, _ROWS, padded.shape[1] // _CHUNK, 8, 16)
    words = nibbles[:, :, :, 0].clone()
    for i in range(1, 8):
        words |= nibbles[:, :, :, i] << (4 * i)
    return words.transpose(1, 2).contiguous()


# asks for the 128 bytes around address $1 to come to the L2 cache, if $2 is not 0
_PREFETCH = tl.constexpr(
    "{\n.reg .pred p;\nsetp.ne.s32 p, $2, 0;\n@p prefetch.global.L2 [$1];\nmov.u32 $0, 0;\n}"
)


@triton.jit  # type: ignore[untyped-decorator]
def _bring(starts, size, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for `size` bytes from each start [n], at most LINES times 128, to come to the L2 cache."""
    offset = tl.arange(0, LINES)[None, :] * 128
    address = starts.to(tl.uint64)[:, None] + offset
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r", [address, (offset < size[:, None]).to(tl.int32)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


def _nibble_asm(nibble: int) -> tl.constexpr:
    """Two words to one nibble of each, as a pair of bf16: put into the mantissa of 128, less 136."""
    byte = nibble // 2
    # that byte of the first word, and of the second into the high half
    select = byte | (4 + byte) << 8
    shift = "shr.b32 t, t, 4;\n" if nibble % 2 else ""
    return tl.constexpr(
        "{\n.reg .b32 t, one, less;\nmov.b32 one, 0x3F803F80;\nmov.b32 less, 0xC308C308;\n"
        f"prmt.b32 t, $1, $2, 0x{select:04x};\n{shift}"
        "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;\n"
        "fma.rn.bf16x2 $0, t, one, less;\n}"
    )


_NIBBLE_0, _NIBBLE_1, _NIBBLE_2, _NIBBLE_3 = (_nibble_asm(i) for i in range(4))
_NIBBLE_4, _NIBBLE_5, _NIBBLE_6, _NIBBLE_7 = (_nibble_asm(i) for i in range(4, 8))


@triton.jit  # type: ignore[untyped-decorator]
def _nibbles(words, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        ASM, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _side_by_side(w):  # type: ignore[no-untyped-def]
    """[rows, 16, slices] to [rows, slices · 16]."""
    return tl.reshape(tl.permute(w, (0, 2, 1)), (w.shape[0], w.shape[1] * w.shape[2]))


@triton.jit  # type: ignore[untyped-decorator]
def _two(words, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.join(_nibbles(words, A), _nibbles(words, B))


@triton.jit  # type: ignore[untyped-decorator]
def _four(words, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    w = tl.join(_two(words, A, C), _two(words, B, D))
    return tl.reshape(w, (w.shape[0], 16, 4))


@triton.jit
def _eight(words):  # type: ignore[no-untyped-def]
    even = tl.join(_two(words, _NIBBLE_0, _NIBBLE_4), _two(words, _NIBBLE_2, _NIBBLE_6))
    odd = tl.join(_two(words, _NIBBLE_1, _NIBBLE_5), _two(words, _NIBBLE_3, _NIBBLE_7))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 16, 8))


@triton.jit  # type: ignore[untyped-decorator]
def _group(  # type: ignore[no-untyped-def]
    w, x, scale, n, at, token, T, N, K, acc, GROUP: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Columns from `at` of INT4 times the tokens, times their group's scale, added to acc."""
    w = _side_by_side(w)
    k = at + tl.arange(0, w.shape[1])
    inside = token[None, :] < T
    if RAGGED:
        inside = inside & (k[:, None] < K)
    xs = tl.load(x + token[None, :] * K + k[:, None], mask=inside, other=0.0)
    group = at // GROUP
    if RAGGED:
        group = tl.minimum(group, (K - 1) // GROUP)
    s = tl.load(scale + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    return acc + tl.dot(w, xs) * s[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def int4_chunk(  # type: ignore[no-untyped-def]
    w, x, scale, n, k, token, T, N, K, acc, GROUP: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """128 columns from k of INT4, words w [rows, 16], times the tokens, added to acc [rows, tokens]."""
    if GROUP >= 128:
        acc = _group(_eight(w), x, scale, n, k, token, T, N, K, acc, GROUP, RAGGED)
    elif GROUP == 64:
        low = _four(w, _NIBBLE_0, _NIBBLE_1, _NIBBLE_2, _NIBBLE_3)
        high = _four(w, _NIBBLE_4, _NIBBLE_5, _NIBBLE_6, _NIBBLE_7)
        acc = _group(low, x, scale, n, k, token, T, N, K, acc, GROUP, RAGGED)
        acc = _group(high, x, scale, n, k + 64, token, T, N, K, acc, GROUP, RAGGED)
    else:
        first_two = _two(w, _NIBBLE_0, _NIBBLE_1)
        acc = _group(first_two, x, scale, n, k, token, T, N, K, acc, GROUP, RAGGED)
        next_two = _two(w, _NIBBLE_2, _NIBBLE_3)
        acc = _group(next_two, x, scale, n, k + 32, token, T, N, K, acc, GROUP, RAGGED)
        next_two = _two(w, _NIBBLE_4, _NIBBLE_5)
        acc = _group(next_two, x, scale, n, k + 64, token, T, N, K, acc, GROUP, RAGGED)
        next_two = _two(w, _NIBBLE_6, _NIBBLE_7)
        acc = _group(next_two, x, scale, n, k + 96, token, T, N, K, acc, GROUP, RAGGED)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    acc, x_scale, scale, bias, out, n, token, T, N, split, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Scales and bias, then [rows, tokens] to out [splits, T, N]."""
    inside = (n[:, None] < N) & (token[None, :] < T)
    if SCALED:
        acc = acc.to(tl.float32) * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    if x_scale is not None:
        acc = acc * tl.load(x_scale + token, mask=token < T, other=0.0)[None, :]
    if HAS_BIAS and split == 0:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + (split.to(tl.int64) * T + token[None, :]) * N + n[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def tile(codes, n, at, last, N, K, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns from `at` of rows n of the weight."""
    k = at + tl.arange(0, BLOCK_K)
    place = codes + n.to(tl.int64)[:, None] * K + k[None, :]
    if WHOLE:
        return tl.load(place)
    else:
        return tl.load(place, mask=(n[:, None] < N) & (k[None, :] < last), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(  # type: ignore[no-untyped-def]
    w, x, token, at, last, T, K, acc, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, exact: tl.constexpr
):  # fmt: skip
    """A tile times the tokens, added to acc [rows, tokens]."""
    k = at + tl.arange(0, BLOCK_K)
    inside = token[None, :] < T
    if not WHOLE:
        inside = inside & (k[:, None] < last)
    xs = tl.load(x + token[None, :] * K + k[:, None], mask=inside, other=0.0)
    if w.dtype != xs.dtype:
        w = w.to(xs.dtype)
    if exact:
        acc = tl.dot(w, xs, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(w, xs, acc, max_num_imprecise_acc=BLOCK_K)
    return acc


@triton.jit(do_not_specialize=["T", "steps"])  # type: ignore[untyped-decorator]
def _skinny(  # type: ignore[no-untyped-def]
    x, x_scale, codes, scale, bias, out, T, N, K, steps, ahead,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, TOKENS)
    first = split * steps * BLOCK_K
    last = tl.minimum(K, first + steps * BLOCK_K)
    if LINES > 0:
        SIZE: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // 8
        size = tl.where(n < N, tl.minimum((last - first) * SIZE, ahead), 0)
        _bring(codes + n.to(tl.int64) * K + first, size, LINES)
    begin(PDL)
    exact: tl.constexpr = x.dtype.element_ty.is_int()
    acc = tl.zeros([BLOCK_N, TOKENS], tl.int32 if exact else tl.float32)
    for at in range(first, last, BLOCK_K):
        w = tile(codes, n, at, last, N, K, BLOCK_K, WHOLE)
        acc = multiply(w, x, token, at, last, T, K, acc, BLOCK_K, WHOLE, exact)
    _finish(acc, x_scale, scale, bias, out, n, token, T, N, split, SCALED, HAS_BIAS)


@triton.jit(do_not_specialize=["T", "steps"])  # type: ignore[untyped-decorator]
def _skinny_int4(  # type: ignore[no-untyped-def]
    x, words, scale, bias, out, T, N, K, chunks, steps, ahead, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # programs that read the same rows for other tokens are neighbours
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1)
    split = tl.program_id(2)
    r = tl.arange(0, BLOCK_N)
    n = block * BLOCK_N + r
    first = split * steps
    last = tl.minimum(chunks, first + steps)
    words += (block.to(tl.int64) * (BLOCK_N // 64) * chunks + first) * 1024
    if LINES > 0:
        # the tile's chunks lie one after the other, 4 KB each for 64 rows
        size = tl.where(n < N, tl.minimum((last - first) * 64, ahead), 0)
        _bring(words + (r // 64 * chunks * 1024 + r % 64 * (size // 4)), size, LINES)
    begin(PDL)
    acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    at = (r // 64 * chunks * 1024 + r % 64 * 16)[:, None] + tl.arange(0, 16)[None, :]
    for chunk in range(first, last):
        w = tl.load(words + at)
        words += 1024
        k = chunk * 128
        acc = int4_chunk(w, x, scale, n, k, token, T, N, K, acc, GROUP, RAGGED)
    _finish(acc, None, scale, bias, out, n, token, T, N, split, False, HAS_BIAS)


@triton.jit  # type: ignore[untyped-decorator]
def _expand_int4(words, scale, out, N, K, chunks, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    r = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 16)[None, :]
    n = block * 64 + r
    w = tl.load(words + (block.to(tl.int64) * chunks + chunk) * 1024 + r * 16 + j)
    for i in tl.static_range(8):
        k = chunk * 128 + i * 16 + j
        inside = (n < N) & (k < K)
        s = tl.load(scale + (k // GROUP) * N + n, mask=inside, other=0.0).to(tl.float32)
        value = (((w >> (4 * i)) & 15) - 8).to(tl.float32) * s
        tl.store(out + n.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=inside)


def expand(weight: Weight) -> Tensor:
    """The weight [N, K] in bf16."""
    rows, columns = weight.shape
    assert weight.scale is not None
    if not weight.group_size:
        return (weight.codes.float() * weight.scale.unsqueeze(1)).to(torch.bfloat16)
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=weight.codes.device)
    chunks = triton.cdiv(columns, _CHUNK)
    _expand_int4[(triton.cdiv(rows, _ROWS), chunks)](
        weight.codes, weight.scale, out, rows, columns, chunks, GROUP=weight.group_size, num_warps=4
    )
    return out


def tiling_for(weight: Weight, tokens: int) -> Tiling:
    """What was fastest on an H100 for Llama-3.2-3B's layers, by sweeps of single layers and of whole
    decode steps (docs/log.md)."""
    rows, columns = weight.shape
    processors = _processors(weight.codes.device)
    few = tokens <= 16
    if weight.group_size:
        block = _ROWS if few and rows < 8192 else _MOST_ROWS
        wanted = processors * (2 if not few else 3 if block == 64 else 4)
        most = max(1, triton.cdiv(columns, _CHUNK) // 2)
        tiles = triton.cdiv(rows, block) * triton.cdiv(tokens, _INT4_TOKENS)
        splits = min(most, max(1, round(wanted / tiles)), 12)
        return Tiling(block, _CHUNK, splits, 3, warps=4 if few else 8, ahead=0)
    widest = 256 // weight.codes.element_size()
    width = next((w for w in (widest, widest // 2) if columns % w == 0), widest)
    most = max(1, columns // width // 2)
    splits = min(most, max(1, round(1.2 * processors / triton.cdiv(rows, 64))), 8)
    return Tiling(64, width, splits, 4 if few else 3)


@lru_cache
def _processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def matmul(
    x: Tensor, x_scale: Tensor | None, weight: Weight, tiling: Tiling | None = None
) -> Tensor:
    """x [T, K] times weight's rows: [T, N] in bf16, or where the inner dimension is split [splits, T, N]
    in float32, to be summed. x_scale: [T, 1] float32, of codes."""
    tokens = x.shape[0]
    rows, columns = weight.shape
    tiling = tiling or tiling_for(weight, tokens)
    splits = tiling.splits
    out = torch.empty(
        (splits, tokens, rows) if splits > 1 else (tokens, rows),
        dtype=torch.float32 if splits > 1 else torch.bfloat16, device=x.device,
    )  # fmt: skip
    options = {
        "TOKENS": min(_INT4_TOKENS, 16 if tokens <= 16 else triton.next_power_of_2(tokens)),
        "LINES": triton.next_power_of_2(triton.cdiv(tiling.ahead, 128)) if tiling.ahead else 0,
        "HAS_BIAS": weight.bias is not None, "num_warps": tiling.warps, "num_stages": tiling.stages,
        **early_start(),
    }  # fmt: skip
    blocks = triton.cdiv(rows, tiling.rows)
    if weight.group_size:
        chunks = triton.cdiv(columns, _CHUNK)
        _skinny_int4[(triton.cdiv(tokens, options["TOKENS"]), blocks, splits)](
            x, weight.codes, weight.scale, weight.bias, out, tokens, rows, columns, chunks,
            triton.cdiv(chunks, splits), tiling.ahead, GROUP=weight.group_size,
            BLOCK_N=tiling.rows, RAGGED=columns % _CHUNK != 0, **options,
        )  # fmt: skip
        return out
    _skinny[(blocks, splits)](
        x, x_scale, weight.codes, weight.scale, weight.bias, out, tokens, rows, columns,
        triton.cdiv(triton.cdiv(columns, tiling.columns), splits), tiling.ahead,
        BLOCK_N=tiling.rows, BLOCK_K=tiling.columns, SCALED=weight.scale is not None,
        WHOLE=rows % tiling.rows == 0 and columns % tiling.columns == 0, **options,
    )  # fmt: skip
    return out
