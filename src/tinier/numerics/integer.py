"""Symmetric integer grids: value ≈ code × scale with code in [-2^(b-1), 2^(b-1) - 1].

Start at `round_to_int`. In: a weight [out, in]. Out: codes [out, in] and one scale per group of
input columns. The scale is absmax / ((2^b - 1) / 2), as compressed-tensors computes it: the grid
spends all its codes, and the largest positive value is clipped by half a step.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    codes: Tensor
    """[out, in], int8 or float8_e4m3fn"""
    scale: Tensor
    """[out, groups], the dtype it is stored in; groups is 1 for one scale per row"""


def int_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a signed integer of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def round_to_int(
    weight: Tensor, *, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> Quantized:
    """Nearest code per element, one scale per `group_size` input columns (None: per row).

    weight: [out, in]. The scale is rounded to `scale_dtype` before the codes are chosen, so the
    codes are the nearest ones for the scale that is stored.
    """
    lowest, highest = int_range(bits)
    groups = _in_groups(weight.float(), group_size)  # [out, groups, size]
    scale = groups.abs().amax(dim=-1) / ((highest - lowest) / 2)
    scale = storable_scale(scale, scale_dtype)
    codes = (groups / scale.float().unsqueeze(-1)).round_().clamp_(lowest, highest)
    return Quantized(codes.reshape(weight.shape).to(torch.int8), scale)


def quantize_tokens_int8(x: Tensor) -> Quantized:
    """Activations to INT8 with one scale per token (row). x: [..., in]; scale: [..., 1], float32."""
    x = x.float()
    scale = storable_scale(x.abs().amax(dim=-1, keepdim=True) / 127.5, torch.float32)
    return Quantized((x / scale).round_().clamp_(-128, 127).to(torch.int8), scale)


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Codes times scales. Returns [out, in] in `dtype`; the product is taken in float32."""
    codes, scale = quantized
    grouped = codes.float().reshape(*scale.shape, -1)  # [out, groups, size]
    return (grouped * scale.float().unsqueeze(-1)).reshape(codes.shape).to(dtype)


def _in_groups(weight: Tensor, group_size: int | None) -> Tensor:
    columns = weight.shape[-1]
    size = columns if group_size is None else group_size
    assert columns % size == 0, f"group size {size} does not divide {columns} columns"
    return weight.reshape(weight.shape[0], columns // size, size)


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored; 1 where it would be 0."""
    # an all-zero group would give scale 0 and codes 0/0; any other scale represents it exactly
    scale = scale.to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))
