from itertools import pairwise

import pytest
import torch

from tinier.numerics import dequantize, expand, snr_db
from tinier.quantization.scales import absmax_scales, round_nearest, searched_scales
from tinier.schemes import PRESETS, Grid, preset_named

GRIDS: dict[str, Grid] = {
    name: preset.scheme.weights for name, preset in PRESETS.items() if "-" not in name
} | {
    "fp8-e5m2": PRESETS["fp8-e5m2"].scheme.weights,
    "fp8-block": PRESETS["fp8-block"].scheme.weights,
    "fp8-static": PRESETS["fp8-static"].scheme.weights,
    "int4-asym": preset_named("int4", 32, symmetric=False).scheme.weights,
    "int2-asym": preset_named("int2", 32, symmetric=False).scheme.weights,
}


def gaussian(seed: int = 0) -> torch.Tensor:
    return torch.randn(128, 256, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [n for n, g in GRIDS.items() if g.kind == "int"])
def test_error_is_at_most_half_a_step_inside_the_grid(name: str) -> None:
    grid, weight = GRIDS[name], gaussian()
    fit = absmax_scales(weight, grid, torch.float32)
    rounded = dequantize(round_nearest(weight, fit, grid), torch.float32)
    step = expand(fit.step, weight.shape)
    # a zero point is a whole code: it moves a grid's ends by up to half a step
    allowed = 0.5 if grid.symmetric else 1.0
    assert ((rounded - weight).abs() <= allowed * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_never_lose_to_the_largest_weight_s(name: str, weighted: bool) -> None:
    grid, weight = GRIDS[name], gaussian(1)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2)).square()
    matters = importance if weighted else torch.ones(256)
    errors = []
    for fit in (
        absmax_scales(weight, grid, torch.bfloat16),
        searched_scales(weight, grid, torch.bfloat16, importance if weighted else None),
    ):
        error = dequantize(round_nearest(weight, fit, grid), torch.float32) - weight
        errors.append((error.square() * matters).sum().item())
    assert errors[1] <= errors[0] * (1 + 1e-6)
    if grid.kind == "int" and grid.bits <= 4:
        assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_the_nearest_for_the_scales_that_are_stored(name: str) -> None:
    grid, weight = GRIDS[name], gaussian(2)
    fit = absmax_scales(weight, grid, torch.bfloat16)
    rounded = dequantize(round_nearest(weight, fit, grid), torch.float32)
    step = expand(fit.step, weight.shape)
    for neighbour in (-1, 1):
        moved = weight + neighbour * 0.02 * step  # no code beside it is nearer
        again = dequantize(round_nearest(moved, fit, grid), torch.float32)
        assert ((rounded - weight).abs() <= (again - weight).abs() * (1 + 1e-5) + 1e-7).all()


@pytest.mark.parametrize("name", GRIDS)
def test_zero_weights_stay_zero(name: str) -> None:
    grid = GRIDS[name]
    weight = gaussian(3)
    weight[:, 128:] = 0.0
    for fit in (
        absmax_scales(weight, grid, torch.float16),
        searched_scales(weight, grid, torch.float16),
    ):
        rounded = dequantize(round_nearest(weight, fit, grid), torch.float32)
        assert torch.isfinite(rounded).all()
        assert (rounded[:, 128:] == 0).all()


def test_each_bit_is_worth_about_six_decibels() -> None:
    weight = gaussian(4)
    ratios = []
    for bits in (2, 3, 4, 8):
        grid = Grid(kind="int", bits=bits, granularity="group", group_size=128)  # type: ignore[arg-type]
        fit = absmax_scales(weight, grid, torch.float32)
        ratio = snr_db(weight, dequantize(round_nearest(weight, fit, grid), torch.float32))
        assert ratio is not None
        ratios.append(ratio)
    # mean square error falls more than 3 times with each bit
    assert all(more - less > 4.8 for less, more in pairwise(ratios[:3]))
    assert 4 * 5.5 < ratios[3] - ratios[2] < 4 * 6.8


def test_a_negative_scale_puts_the_extra_code_on_the_side_of_the_largest_weight() -> None:
    grid = preset_named("int4", 8).scheme.weights
    weight = torch.tensor([[8.0, 1, -1, 2, -2, 3, -3, 4]])
    fit = searched_scales(weight, grid, torch.float32)
    assert fit.scale.item() == -1.0
    assert torch.equal(dequantize(round_nearest(weight, fit, grid), torch.float32), weight)


def test_many_rows_are_searched_in_parts_with_the_same_result() -> None:
    weight = torch.randn(5000, 32, generator=torch.Generator().manual_seed(5))
    grid = preset_named("int4", 16).scheme.weights
    whole = searched_scales(weight, grid, torch.bfloat16)
    some = searched_scales(weight[4000:4500], grid, torch.bfloat16)
    assert torch.equal(whole.scale[4000:4500], some.scale)
