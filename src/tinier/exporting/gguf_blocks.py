"""Codes and scales as the blocks of a GGUF file, 32 weights each; nothing is rounded but a scale.

Layouts: ggml's `ggml-common.h`. `d` and `m` are float16.

- Q4_0: (q - 8) · d, d and 16 bytes; low halves are the first 16 weights, high ones the last
- Q4_1: q · d + m, d, m and 16 bytes
- Q8_0: q · d, d and 32 int8
- MXFP4: an E8M0 byte and 16 bytes of E2M1, halves as in Q4_0
- NVFP4, 64 weights: four E4M3 bytes, one for each 16, and four times 8 bytes of E2M1, in halves of 8;
  what the scales are divided by lies beside the tensor
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from tinier.errors import SchemeError
from tinier.numerics import Quantized, e2m1_codes, e8m0_codes
from tinier.schemes import Scheme

_BLOCK = 32


def block_type(scheme: Scheme) -> GGMLQuantizationType | None:
    """The type whose numbers a scheme's are; None: there is none."""
    grid = scheme.weights
    in_blocks = grid.granularity == "channel" or (grid.group_size or 1) % _BLOCK == 0
    if grid.kind == "int" and grid.granularity in ("channel", "group") and in_blocks:
        if grid.bits == 8 and grid.symmetric:
            return GGMLQuantizationType.Q8_0
        if grid.bits == 4:
            return GGMLQuantizationType.Q4_0 if grid.symmetric else GGMLQuantizationType.Q4_1
    if grid.scale_format == "e8m0":
        return GGMLQuantizationType.MXFP4
    if grid.scale_format == "e4m3":
        return GGMLQuantizationType.NVFP4
    return None


def packed(quantized: Quantized, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Codes [out, in] as rows of blocks, uint8 [out, bytes]. Raises SchemeError where blocks do not fill a
    row, or float16 has no room for a scale."""
    codes, columns = quantized.codes.cpu(), quantized.codes.shape[1]
    block = GGML_QUANT_SIZES[kind][0]
    if columns % block:
        raise SchemeError(f"a row of {columns} weights does not fill blocks of {block}.")
    rows, blocks = len(codes), columns // block
    stored = quantized.scale.cpu()
    repeats = max(1, blocks // stored.shape[1])  # a block of NVFP4 has four scales
    scale = stored.float().repeat_interleave(repeats, dim=1)
    if kind == GGMLQuantizationType.NVFP4:
        scales = stored.view(torch.uint8).view(rows, blocks, 4)
        parts = [scales, _halves(e2m1_codes(codes), 8).view(rows, blocks, 32)]
    elif kind == GGMLQuantizationType.MXFP4:
        parts = [e8m0_codes(scale).unsqueeze(2), _halves(e2m1_codes(codes), 16)]
    elif kind == GGMLQuantizationType.Q8_0:
        parts = [_half_precision(scale), codes.view(torch.uint8).view(rows, blocks, _BLOCK)]
    else:
        parts = [_half_precision(scale)]
        if kind == GGMLQuantizationType.Q4_1:
            assert quantized.zero_point is not None
            zero = quantized.zero_point.cpu().float().repeat_interleave(repeats, dim=1)
            parts.append(_half_precision(-(zero + 8) * scale))
        parts.append(_halves((codes + 8).view(torch.uint8), 16))
    found: NDArray[np.uint8] = torch.cat(parts, dim=2).flatten(1).numpy()
    return found


def _halves(nibbles: Tensor, size: int) -> Tensor:
    """Numbers of 4 bits [rows, in] as bytes [rows, in / (2 · size), size]: `size` of them in the low
    halves, the next in the high ones."""
    halves = nibbles.unflatten(1, (-1, 2, size))
    joined: Tensor = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return joined


def _half_precision(scale: Tensor) -> Tensor:
    """float16 [rows, blocks] as bytes [rows, blocks, 2]."""
    narrow = scale.half()
    if not torch.isfinite(narrow).all():
        raise SchemeError("a scale is larger than float16 goes, in which GGUF has them.")
    return narrow.view(torch.uint8).view(*scale.shape, 2)
