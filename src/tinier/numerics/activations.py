"""Activations on their grids: what a token's numbers become before a quantized layer multiplies them.

Start at `quantize_tokens_int8` and its neighbours. Scales are float32 and found from the numbers
themselves (dynamic), except where one is passed in.
"""

import torch
from torch import Tensor

from tinier.numerics.integer import Quantized, storable_scale
from tinier.numerics.minifloat import E2M1_MAX, E4M3_MAX, cast_e4m3, mx_scale, round_to_e2m1


def quantize_tokens_int8(x: Tensor) -> Quantized:
    """INT8 with one scale per token (row). x: [..., in]; scale: [..., 1]."""
    x = x.float()
    scale = storable_scale(x.abs().amax(dim=-1, keepdim=True) / 127.5, torch.float32)
    return Quantized((x / scale).round_().clamp_(-128, 127).to(torch.int8), scale)


def quantize_tokens_e4m3(x: Tensor) -> Quantized:
    """E4M3 with one scale per token. x: [..., in]; scale: [..., 1]."""
    x = x.float()
    scale = storable_scale(x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX, torch.float32)
    return Quantized(cast_e4m3(x / scale), scale)


def round_static(x: Tensor, kind: str, scale: Tensor) -> Tensor:
    """x rounded to INT8 or E4M3 (`kind` int or float) with one given scale, and back; float32."""
    scale = scale.float()
    if kind == "int":
        return (x.float() / scale).round_().clamp_(-128, 127) * scale
    return cast_e4m3(x.float() / scale).float() * scale


def round_groups_e4m3(x: Tensor, size: int) -> Tensor:
    """x rounded to E4M3 with one scale per `size` neighbours of a token, and back; float32."""
    groups = x.float().unflatten(-1, (-1, size))
    scale = storable_scale(groups.abs().amax(dim=-1, keepdim=True) / E4M3_MAX, torch.float32)
    return (cast_e4m3(groups / scale).float() * scale).flatten(-2)


def round_groups_nvfp4(x: Tensor, size: int, global_scale: Tensor) -> Tensor:
    """x rounded to E2M1 with E4M3 scales per group, those divided by `global_scale`, and back."""
    groups = x.float().unflatten(-1, (-1, size))
    wanted = groups.abs().amax(dim=-1, keepdim=True) * (global_scale / E2M1_MAX)
    scale = cast_e4m3(wanted).float()
    # compressed-tensors' stand-in for a scale that rounds to zero
    scale = torch.where(scale == 0, torch.full_like(scale, 0.125), scale) / global_scale
    return (round_to_e2m1(groups / scale) * scale).flatten(-2)


def round_groups_mxfp4(x: Tensor, size: int) -> Tensor:
    """x rounded to E2M1 with power-of-two scales per group, and back; float32."""
    groups = x.float().unflatten(-1, (-1, size))
    scale = mx_scale(groups.abs().amax(dim=-1, keepdim=True))
    return (round_to_e2m1(groups / scale) * scale).flatten(-2)
