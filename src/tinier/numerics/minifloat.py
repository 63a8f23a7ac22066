"""The small floating-point grids: FP8 E4M3 and E5M2, FP4 E2M1, and the E8M0 and E4M3 block scales.

Start at `round_to_float`. OCP FP8 (E4M3: largest value 448, no infinity; E5M2: 57344) and OCP
Microscaling (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; E8M0: powers of two). All casts
saturate and round to the nearest value, ties to the even mantissa.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E2M1_MAX = 6.0
_E8M0_BIAS = 127
# between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6; at the tie the value with an even mantissa wins
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_to_float(x: Tensor, bits: int) -> Tensor:
    """Nearest value of E4M3 (8 bits) or E2M1 (4 bits), in float32. x: any shape, already scaled."""
    if bits == 8:
        return cast_e4m3(x).float()
    assert bits == 4, f"no float grid of {bits} bits"
    return round_to_e2m1(x)


def cast_e4m3(x: Tensor) -> Tensor:
    """x as float8_e4m3fn, saturating at ±448."""
    # torch's cast turns values past 448 into NaN; a rounded scale can push the largest one there
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def cast_e5m2(x: Tensor) -> Tensor:
    """x as float8_e5m2, saturating at ±57344."""
    return x.clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)


def round_to_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, in float32."""
    size = x.float().abs().clamp(max=E2M1_MAX)
    # the step is 0.5 below 2, 1 below 4 and 2 above; torch rounds halves to even, which in units of
    # the step is the even mantissa
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign((size / step).round_().mul_(step), x.float())


def e2m1_codes(values: Tensor) -> Tensor:
    """The 4-bit codes (sign, exponent, mantissa) of E2M1 values, as uint8."""
    table = torch.tensor(_E2M1_VALUES, device=values.device)
    index = torch.bucketize(values.float().abs(), table)
    return (index | (torch.signbit(values.float()).int() << 3)).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """The values of 4-bit codes, as float8_e4m3fn, which holds each of them exactly."""
    table = torch.tensor(_E2M1_VALUES, device=codes.device)
    value = table[(codes & 7).long()]
    return torch.where(codes >= 8, -value, value).to(torch.float8_e4m3fn)


def e8m0_codes(scale: Tensor) -> Tensor:
    """The exponents of powers of two, as uint8."""
    exponent = torch.frexp(scale.float()).exponent - 1  # a power of two is 0.5 · 2^(e + 1)
    return (exponent + _E8M0_BIAS).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """The powers of two of exponents, in float32."""
    return torch.ldexp(torch.ones(codes.shape, device=codes.device), codes.int() - _E8M0_BIAS)


def mx_scale(absmax: Tensor) -> Tensor:
    """The power of two that a block of E2M1 values is scaled with, as compressed-tensors finds it.

    The block's largest value falls into [3.5, 7): past 6 it is clipped, where OCP's plain rule clips
    up to 8. Powers are kept within E8M0's range. Returns float32.
    """
    mantissa, exponent = torch.frexp(absmax.float())  # absmax = mantissa · 2^exponent, in [0.5, 1)
    exponent = torch.where(mantissa >= 0.875, exponent, exponent - 1) - 2
    return torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-126, 125))
