"""The FP8 E4M3 grid (OCP FP8: 4 exponent bits, 3 mantissa bits, no infinity, largest value 448).

Start at `round_to_e4m3`. The cast to float8_e4m3fn is torch's own, round-to-nearest-even.
"""

import torch
from torch import Tensor

from tinier.numerics.integer import Quantized, storable_scale

E4M3_MAX = 448.0


def round_to_e4m3(weight: Tensor, *, scale_dtype: torch.dtype) -> Quantized:
    """Nearest E4M3 value per element with one scale per row. weight: [out, in]; scale: [out, 1]."""
    scale = storable_scale(weight.float().abs().amax(dim=-1, keepdim=True) / E4M3_MAX, scale_dtype)
    return Quantized(_cast(weight.float() / scale.float()), scale)


def quantize_tokens_e4m3(x: Tensor) -> Quantized:
    """Activations to E4M3 with one scale per token. x: [..., in]; scale: [..., 1], float32."""
    x = x.float()
    scale = storable_scale(x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX, torch.float32)
    return Quantized(_cast(x / scale), scale)


def _cast(x: Tensor) -> Tensor:
    # torch's cast turns values past 448 into NaN; a rounded scale can push the largest one there
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
