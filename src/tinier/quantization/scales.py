"""Fit a grid to a weight, and round to it.

Start at `absmax_scales`, `searched_scales` and `round_nearest`. In: a weight [out, in], a grid and,
for the search, how much each input column matters. Out: a `Fit`, and from it a `Quantized`.

Two things differ from the usual: the scale is rounded to the type it is stored in before any code is
chosen, and the scale of a symmetric grid of few bits may be negative. The integer grid has one more
code below zero than above; turning it over puts that code on the side of the largest weight.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.numerics import (
    E2M1_MAX,
    E4M3_MAX,
    Quantized,
    cast_e4m3,
    cast_e5m2,
    dequantize,
    expand,
    in_blocks,
    invertible,
    mx_scale,
    round_to_float,
    storable_scale,
)
from tinier.schemes import Grid

# fractions of the largest weight that the grid is made to end at
_SHRINKS = tuple(1.04 - 0.04 * i for i in range(15))
# a float grid looks the same at twice the scale: one octave of scales is all there is to search
_OCTAVE = tuple(2 ** (-i / 24) for i in range(24))
_ROWS = 4096
# of a table at once: there may be a quarter of a million
_TABLE_ROWS = 8192


class Fit(NamedTuple):
    """A grid laid over a weight: `Quantized` without the codes."""

    scale: Tensor
    """[R, C], the dtype it is stored in"""
    zero_point: Tensor | None
    """[R, C] int8"""
    global_scale: Tensor | None
    """[1] float32"""

    @property
    def step(self) -> Tensor:
        """What one unit of code is worth: [R, C], float32."""
        scale = self.scale.float()
        return scale if self.global_scale is None else scale / self.global_scale


def round_table(table: Tensor, grid: Grid, dtype: torch.dtype) -> Quantized:
    """An embedding or a head [rows, in], each scale searched, to nearest. dtype: as in `absmax_scales`."""
    parts = [
        round_nearest(rows, searched_scales(rows, grid, dtype), grid)
        for rows in table.split(_TABLE_ROWS)
    ]
    return Quantized(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]))


def absmax_scales(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Fit:
    """Scales that let the largest weight of each block reach the end of the grid.

    weight: [out, in]. dtype: the type scales are stored in, where the grid does not name its own.
    Symmetric integers: absmax / ((2^b - 1) / 2), as compressed-tensors computes it.
    """
    blocks = in_blocks(
        weight.float(), grid.blocks((weight.shape[0], weight.shape[1]))
    )  # [R, r, C, c]
    if not grid.symmetric:
        return _asymmetric(blocks, grid, dtype, 1.0)
    absmax = blocks.abs().amax(dim=(1, 3))  # [R, C]
    return _stored(absmax / _reach(grid), grid, dtype)


def searched_scales(
    weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None
) -> Fit:
    """Scales of least squared rounding error, each column's weighted with `importance`.

    weight: [out, in]. importance: [in], such as the mean square of the column's input; None: equal.
    Every block takes the best of a fixed list of candidates, so the result is never worse than
    `absmax_scales` by that measure.
    """
    if weight.shape[0] > _ROWS and rows_stand_alone(grid):
        parts = [searched_scales(w, grid, dtype, importance) for w in weight.split(_ROWS)]
        zeros = [p.zero_point for p in parts if p.zero_point is not None]
        scale = torch.cat([p.scale for p in parts])
        return Fit(scale, torch.cat(zeros) if zeros else None, None)
    blocks = in_blocks(weight.float(), grid.blocks((weight.shape[0], weight.shape[1])))
    rows, _, columns, size = blocks.shape
    matters = torch.ones(columns, size, device=weight.device)
    if importance is not None:
        matters = importance.float().reshape(columns, size)
    best: Fit | None = None
    least = torch.full((rows, columns), torch.inf, device=weight.device)
    for fit in _candidates(blocks, grid, dtype):
        step = fit.step[:, None, :, None]
        zero = None if fit.zero_point is None else fit.zero_point.float()[:, None, :, None]
        error = round_scaled(blocks / step, grid, zero).sub_(zero if zero is not None else 0.0)
        error = error.mul_(step).sub_(blocks).square_().mul_(matters[None, None])
        loss = error.sum(dim=(1, 3))  # [R, C]
        if best is None:
            best, least = fit, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = Fit(
            torch.where(better, fit.scale, best.scale),
            None if fit.zero_point is None or best.zero_point is None
            else torch.where(better, fit.zero_point, best.zero_point),
            best.global_scale,
        )  # fmt: skip
    assert best is not None
    return best


def rows_stand_alone(grid: Grid) -> bool:
    """Whether no scale is shared between rows, so that rows can be split and stacked at will."""
    return grid.granularity in ("channel", "group") and grid.scale_format != "e4m3"


def round_scaled(x: Tensor, grid: Grid, zero: Tensor | None = None) -> Tensor:
    """Nearest code of each scaled number, in float32; with `zero` the code counts from there."""
    if grid.kind == "e5m2":
        return cast_e5m2(x.clamp(*grid.code_range)).float()
    if grid.kind == "float":
        return round_to_float(x, grid.bits)
    lowest, highest = grid.code_range
    codes = x.round()
    return (codes if zero is None else codes.add_(zero)).clamp_(lowest, highest)


def stored_codes(values: Tensor, grid: Grid) -> Tensor:
    """Codes as float32 in the type that `Quantized` holds them in."""
    if grid.kind == "e5m2":
        return cast_e5m2(values)
    return cast_e4m3(values) if grid.kind == "float" else values.to(torch.int8)


def round_nearest(weight: Tensor, fit: Fit, grid: Grid) -> Quantized:
    """Nearest code per element of a weight [out, in]."""
    scaled = weight.float() / expand(fit.step, weight.shape)
    zero = None if fit.zero_point is None else expand(fit.zero_point.float(), weight.shape)
    return Quantized(stored_codes(round_scaled(scaled, grid, zero), grid), *fit)


def to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """weight [out, in] rounded to nearest with the scales of its largest weights, and back; float32."""
    fit = absmax_scales(weight, grid, torch.float32)
    return dequantize(round_nearest(weight, fit, grid), torch.float32)


def _candidates(blocks: Tensor, grid: Grid, dtype: torch.dtype) -> Iterator[Fit]:
    """Fits to choose from, for each block on its own. The first one is that of `absmax_scales`."""
    if not grid.symmetric:
        yield from (_asymmetric(blocks, grid, dtype, shrink) for shrink in _shrinks_from_one())
        return
    absmax = blocks.abs().amax(dim=(1, 3))
    store = _storer(absmax / _reach(grid), grid, dtype)
    if grid.kind != "int" and grid.scale_format == "model":
        yield from (store(absmax / _reach(grid) * factor) for factor in _OCTAVE)
        return
    if grid.scale_format == "e8m0":
        yield from (store(absmax / _reach(grid) * factor) for factor in (1.0, 0.5, 2.0))
        return
    yield from (store(absmax / _reach(grid) * shrink) for shrink in _shrinks_from_one())
    if grid.kind == "int" and grid.bits <= 4:
        # the side of the largest weight gets the code below -(2^(b-1) - 1)
        flat = blocks.permute(0, 2, 1, 3).flatten(2)  # [R, C, r·c]
        largest = flat.gather(2, flat.abs().argmax(dim=2, keepdim=True)).squeeze(2)
        full = -largest / (1 << (grid.bits - 1))
        yield from (store(full * shrink) for shrink in _shrinks_from_one())


def _shrinks_from_one() -> list[float]:
    return sorted(_SHRINKS, key=lambda shrink: abs(shrink - 1.0))


def _reach(grid: Grid) -> float:
    """What the largest weight of a block is divided by to get its scale."""
    lowest, highest = grid.code_range
    return (highest - lowest) / 2


def _stored(scale: Tensor, grid: Grid, dtype: torch.dtype) -> Fit:
    return _storer(scale, grid, dtype)(scale)


def _storer(largest: Tensor, grid: Grid, dtype: torch.dtype) -> Callable[[Tensor], Fit]:
    """A function from wanted scales [R, C] to a Fit with scales as they are stored.

    largest: the scales that reach the largest weights; they set the scale over the scales.
    """
    if grid.scale_format == "e8m0":
        return lambda scale: Fit(mx_scale(scale * E2M1_MAX), None, None)
    if grid.scale_format == "e4m3":
        # compressed-tensors' global scale: it brings the largest block scale to E4M3's end
        top = largest.max()
        over = invertible(torch.where(top > 0, E4M3_MAX / top, torch.ones_like(top)).reshape(1))
        return lambda scale: Fit(storable_block_scale(scale * over), None, over)
    return lambda scale: Fit(storable_scale(scale, dtype), None, None)


def storable_block_scale(scale: Tensor) -> Tensor:
    """NVFP4's block scales (already times the global scale) as they are stored, in E4M3."""
    # the smallest positive value stands in for a scale that would be zero
    return cast_e4m3(scale.clamp(min=2.0**-9))


def _asymmetric(blocks: Tensor, grid: Grid, dtype: torch.dtype, shrink: float) -> Fit:
    """The range from the smallest to the largest weight, times `shrink`; zero is always in it."""
    lowest, highest = grid.code_range
    low = blocks.amin(dim=(1, 3)).clamp(max=0.0) * shrink
    high = blocks.amax(dim=(1, 3)).clamp(min=0.0) * shrink
    scale = storable_scale((high - low) / (highest - lowest), dtype)
    zero = (lowest - low / scale.float()).round().clamp(lowest, highest)
    return Fit(scale, zero.to(torch.int8), None)
