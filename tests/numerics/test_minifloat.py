"""Each grid against its definition, brute force, and against torch's and compressed-tensors' own."""

import pytest
import torch
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

from tinier.numerics import (
    E2M1_MAX,
    E4M3_MAX,
    E5M2_MAX,
    cast_e4m3,
    cast_e5m2,
    e2m1_codes,
    e2m1_values,
    mx_scale,
    round_to_e2m1,
    round_to_float,
)


def values_of(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> torch.Tensor:
    """Every value (-1)^s · 2^(e-bias) · (1 + m/2^M), subnormal at e = 0, up to `largest`."""
    steps = 2**mantissa_bits
    positive = [
        (m / steps) * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias)
        for e in range(2**exponent_bits)
        for m in range(steps)
    ]
    return torch.tensor(sorted({s * v for v in positive if v <= largest for s in (-1, 1)}))


GRIDS = {
    "e4m3": (values_of(4, 3, 7, E4M3_MAX), lambda x: cast_e4m3(x).float()),
    "e5m2": (values_of(5, 2, 15, E5M2_MAX), lambda x: cast_e5m2(x).float()),
    "e2m1": (values_of(2, 1, 1, E2M1_MAX), round_to_e2m1),
}


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_is_to_the_nearest_value_of_the_definition(name: str) -> None:
    grid, rounding = GRIDS[name]
    spread = torch.logspace(-4, 1.2, 3000) * grid.max() / 10
    x = torch.cat((spread, -spread, grid, torch.tensor([0.0])))
    nearest = (x.unsqueeze(1) - grid).abs().min(dim=1).values
    rounded = rounding(x)
    assert torch.isin(rounded, grid).all()
    assert torch.equal((x - rounded).abs(), nearest)
    assert torch.equal(rounding(grid), grid)


def test_a_tie_goes_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_to_e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert round_to_e2m1(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


def test_rounding_is_that_of_torch_and_of_compressed_tensors() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(round_to_float(x, 8), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(round_to_float(x, 4), FP4_E2M1_DATA.cast_to_fp4(x.clamp(-6, 6)))


def test_nothing_turns_into_nan_or_infinity() -> None:
    x = torch.tensor([1e9, -1e9, 449.0, 480.0, 6e4])
    for _, rounding in GRIDS.values():
        assert torch.isfinite(rounding(x)).all()


def test_nibbles_hold_every_e2m1_value() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1_values(codes)
    assert values[:8].float().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert torch.equal(e2m1_codes(values), codes)


def test_power_of_two_scales_are_those_of_compressed_tensors() -> None:
    largest = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100 + 1e-3
    theirs = 2.0 ** (generate_mx_scales(largest, num_bits=4) - 127)
    assert torch.equal(mx_scale(largest), theirs)
