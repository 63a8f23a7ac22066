"""A linear layer of INT8 weights and activations over many tokens (prompts), in Triton.

out[t, n] = (Σ_k x[t, k] · w[n, k]) · x_scale[t] · scale[n] + bias[n]. The sums are integers and exact;
scales and bias are applied where the sums are, in registers: torch._int_mm leaves 4 bytes a number in
memory, to be read again for that. On Hopper tiles come by the tensor memory accelerator, elsewhere by
addresses. Few tokens: skinny.py.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tinier.kernels.fused import begin, early_start
from tinier.kernels.machine import machine_of

_TOGETHER = 8  # tiles of tokens that share a weight's rows while these are in the L2 cache
# bytes of shared memory that the largest tiles take: data center GPUs from Hopper on have them
_LARGE_TILES = 200_000


class Tiling(NamedTuple):
    tokens: int
    rows: int
    warps: int
    stages: int
    by_descriptor: bool
    """Tiles come by the tensor memory accelerator"""
    columns: int = 128


@triton.jit  # type: ignore[untyped-decorator]
def place(number, T, N, TOKENS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile of tokens and which of rows a program computes: all rows for a few tiles of tokens first,
    so that what neighbours read is in the L2 cache."""
    many = tl.cdiv(N, ROWS)
    first = number // (TOGETHER * many) * TOGETHER
    here = tl.minimum(tl.cdiv(T, TOKENS) - first, TOGETHER)
    within = number % (TOGETHER * many)
    return first + within % here, within // here


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, x_scale, codes, scale, bias, out, T, N, K, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, BY_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, block = place(tl.program_id(0), T, N, TOKENS, ROWS, TOGETHER)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    n = block * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    begin(PDL)
    acc = tl.zeros([TOKENS, ROWS], tl.int32)
    if BY_DESCRIPTOR:  # what lies outside is read as zeros
        for at in range(0, K, COLUMNS):
            a = x.load([tile * TOKENS, at])
            w = codes.load([block * ROWS, at])
            acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
    else:
        # tokens and rows outside: others instead, whose results are not written
        tokens_at = x + (token % T).to(tl.int64)[:, None] * K + k[None, :]
        rows_at = codes + (n % N).to(tl.int64)[None, :] * K + k[:, None]
        for at in range(0, K, COLUMNS):
            if WHOLE:
                a = tl.load(tokens_at)
                w = tl.load(rows_at)
            else:
                a = tl.load(tokens_at, mask=k[None, :] < K - at, other=0)
                w = tl.load(rows_at, mask=k[:, None] < K - at, other=0)
            acc = tl.dot(a, w, acc, out_dtype=tl.int32)
            tokens_at += COLUMNS
            rows_at += COLUMNS
    y = acc.to(tl.float32) * tl.load(x_scale + token, mask=token < T, other=0.0)[:, None]
    y = y * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (token[:, None] < T) & (n[None, :] < N)
    at = token.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def tiling_for(tokens: int, device: torch.device) -> Tiling:
    """What was fastest on an H100 for Llama-3.2-3B's layers (docs/log.md), of what there is room for."""
    if tokens <= 384:
        return Tiling(64, 128, 4, 4, False)
    by_descriptor = machine_of(device).capability >= (9, 0)
    if _shared_memory(device) < _LARGE_TILES:
        return Tiling(128, 128, 8, 3, by_descriptor)
    return Tiling(128, 128, 4, 4, True) if tokens <= 768 else Tiling(256, 128, 8, 4, True)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    room: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return room


def matmul(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """x [T, K] int8 times rows [N, K] int8: [T, N] in dtype. K must be a multiple of 16.

    x_scale: [T, 1], scale: [N], both float32; bias: [N].
    """
    (tokens, columns), rows = x.shape, len(codes)
    tiling = tiling or tiling_for(tokens, x.device)
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    first, second = x, codes
    if tiling.by_descriptor:
        first = TensorDescriptor.from_tensor(x, [tiling.tokens, tiling.columns])
        second = TensorDescriptor.from_tensor(codes, [tiling.rows, tiling.columns])
    grid = (triton.cdiv(tokens, tiling.tokens) * triton.cdiv(rows, tiling.rows),)
    _product[grid](
        first, x_scale, second, scale, scale if bias is None else bias, out, tokens, rows, columns,
        TOKENS=tiling.tokens, ROWS=tiling.rows, COLUMNS=tiling.columns, TOGETHER=_TOGETHER,
        BY_DESCRIPTOR=tiling.by_descriptor, WHOLE=columns % tiling.columns == 0,
        HAS_BIAS=bias is not None, num_warps=tiling.warps, num_stages=tiling.stages, **early_start(),
    )  # fmt: skip
    return out
