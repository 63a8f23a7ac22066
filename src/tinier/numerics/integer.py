"""Integer grids: value ≈ (code - zero point) × scale with code in [-2^(b-1), 2^(b-1) - 1].

`Quantized` is what every algorithm returns, for floating-point grids too. Which blocks of a weight
share a scale follows from the scale's shape (`expand`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    codes: Tensor
    """[out, in], int8 or a float8 type; E2M1 values are held in float8_e4m3fn, which has them all"""
    scale: Tensor
    """[R, C], the dtype it is stored in: each scale covers out/R rows and in/C columns"""
    zero_point: Tensor | None = None
    """[R, C] int8, the code of zero; None on a symmetric grid"""
    global_scale: Tensor | None = None
    """[1] float32, which every scale is divided by; None but for NVFP4"""


def int_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a signed integer of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def step_size(quantized: Quantized) -> Tensor:
    """What one unit of code is worth: [R, C], float32."""
    scale = quantized.scale.float()
    return scale if quantized.global_scale is None else scale / quantized.global_scale


def expand(blocks: Tensor, shape: torch.Size) -> Tensor:
    """One value per block [R, C] to one per element [out, in]."""
    rows, columns = shape[0] // blocks.shape[0], shape[1] // blocks.shape[1]
    return blocks.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """(Codes - zero point) times scale. Returns [out, in] in `dtype`; computed in float32."""
    codes = quantized.codes
    blocks = in_blocks(codes.float(), quantized.scale.shape)
    if quantized.zero_point is not None:
        blocks = blocks - quantized.zero_point.float()[:, None, :, None]
    values = blocks * step_size(quantized)[:, None, :, None]
    return values.reshape(codes.shape).to(dtype)


def to_pairs(nibbles: Tensor) -> Tensor:
    """Numbers of 4 bits [n, m], uint8, as bytes [n, m/2], the even column in the low half."""
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def from_pairs(pairs: Tensor) -> Tensor:
    """The inverse of `to_pairs`."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def in_blocks(weight: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """weight [out, in] as [R, out/R, C, in/C], where `blocks` is (R, C)."""
    rows, columns = weight.shape
    assert rows % blocks[0] == 0, f"{blocks[0]} blocks do not divide {rows} rows"
    assert columns % blocks[1] == 0, f"{blocks[1]} blocks do not divide {columns} columns"
    return weight.reshape(blocks[0], rows // blocks[0], blocks[1], columns // blocks[1])


def invertible(scale: Tensor) -> Tensor:
    """The float32 number next to `scale` that its inverse gives back: other tools store the inverse."""
    # of random numbers 17 % are not; the inverse of an inverse always is
    return 1 / (1 / scale)


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored: 1 where it is 0, and the smallest number of its type where it would
    become 0 there."""
    # an all-zero group would give scale 0 and codes 0/0; any other scale represents it exactly
    stored = scale.to(dtype)
    info = torch.finfo(dtype)
    smallest = torch.full_like(stored, info.tiny * info.eps).copysign(scale.to(dtype))
    stored = torch.where(stored != 0, stored, smallest)
    return torch.where(scale != 0, stored, torch.ones_like(stored))
