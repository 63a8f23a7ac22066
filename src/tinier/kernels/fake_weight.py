"""Fake quantization of a weight on a GPU, in one kernel each way. Start at `rounded_cuda`.

The plain torch version is in `tinier.quantization.fake`, where each way is a dozen passes over memory.
A cell is what one row has of one block of the grid: its numbers lie side by side, and share a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.codes import code_kind, nearest_code
from tinier.schemes import Grid

_NUMBERS = 4096
"""Of one program at once"""
_WIDEST = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _cells(step, zero, cells, across, tall, HAS_ZERO: tl.constexpr, CELLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's cells, which of them there are, and their steps and zero points, [CELLS, 1]."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < cells
    block = cell // across // tall * across + cell % across
    s = tl.load(step + block, mask=there, other=1.0)[:, None]
    z = tl.zeros((CELLS, 1), tl.float32)
    if HAS_ZERO:
        z = tl.load(zero + block, mask=there, other=0.0)[:, None]
    return cell.to(tl.int64), there, s, z


@triton.jit  # type: ignore[untyped-decorator]
def _rounded_kernel(  # type: ignore[no-untyped-def]
    weight, step, zero, out, cells, size, across, tall, lowest, highest,
    KIND: tl.constexpr, HAS_ZERO: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cell, there, s, z = _cells(step, zero, cells, across, tall, HAS_ZERO, CELLS)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < size)[None, :]
        at = cell[:, None] * size + column[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0)
        code = nearest_code(tl.div_rn(w, s + tl.zeros_like(w)), z, lowest, highest, KIND)
        tl.store(out + at, ((code - z) * s).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_kernel(  # type: ignore[no-untyped-def]
    weight, step, zero, outer, to_weight, to_step, cells, size, across, tall, lowest, highest,
    KIND: tl.constexpr, HAS_ZERO: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cell, there, s, z = _cells(step, zero, cells, across, tall, HAS_ZERO, CELLS)
    total = tl.zeros((CELLS, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < size)[None, :]
        at = cell[:, None] * size + column[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0)
        g = tl.load(outer + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.div_rn(w, s + tl.zeros_like(w))
        code = nearest_code(x, z, lowest, highest, KIND)
        moves = (x + z >= lowest) & (x + z <= highest)
        tl.store(to_weight + at, tl.where(moves, g, 0.0), mask=inside)
        total += g * (code - z - tl.where(moves, x, 0.0))
    tl.store(to_step + cell, tl.sum(total, axis=1), mask=there)


def rounded_cuda(
    weight: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, dtype: torch.dtype
) -> Tensor:
    """The weight that the nearest codes stand for, in `dtype`.

    weight: [out, in] float32. step, zero: [R, C] float32.
    """
    weight, step = weight.contiguous(), step.contiguous()
    out = torch.empty_like(weight, dtype=dtype)
    launch, numbers, constants = _launch(weight, step, zero, grid)
    zeros = step if zero is None else zero.contiguous()
    _rounded_kernel[launch](weight, step, zeros, out, *numbers, *constants)
    return out


def gradients_cuda(
    weight: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, outer: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [out, in] and step [R, C], float32, from that of the rounded weight."""
    weight, step, outer = weight.contiguous(), step.contiguous(), outer.contiguous()
    blocks, columns = step.shape
    to_weight = torch.empty_like(weight)
    to_step = torch.empty(len(weight), columns, device=weight.device)
    launch, numbers, constants = _launch(weight, step, zero, grid)
    zeros = step if zero is None else zero.contiguous()
    _gradients_kernel[launch](weight, step, zeros, outer, to_weight, to_step, *numbers, *constants)
    return to_weight, to_step.view(blocks, -1, columns).sum(dim=1)


def _launch(
    weight: Tensor, step: Tensor, zero: Tensor | None, grid: Grid
) -> tuple[tuple[int], tuple[float, ...], tuple[int, ...]]:
    """Programs, the numbers that both kernels take, and the constants."""
    blocks, across = step.shape
    cells, size, tall = len(weight) * across, weight.shape[1] // across, len(weight) // blocks
    block = min(_WIDEST, triton.next_power_of_2(size))
    together = max(1, _NUMBERS // block)
    return (
        (triton.cdiv(cells, together),),
        (cells, size, across, tall, *map(float, grid.code_range)),
        (code_kind(grid.kind, grid.bits), zero is not None, together, block),
    )
