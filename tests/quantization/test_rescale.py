import pytest
import torch
from torch import Tensor

from tinier.numerics import Quantized, dequantize
from tinier.quantization.gptq import DAMP, Inverse, gptq
from tinier.quantization.rescale import can_rescale, rescaled
from tinier.quantization.scales import round_nearest, searched_scales
from tinier.schemes import PRESETS, Grid, preset_named

GRIDS: dict[str, Grid] = {
    "int4": preset_named("int4", 32).scheme.weights,
    "int2": preset_named("int2", 32).scheme.weights,
    "int4-asym": preset_named("int4", 32, symmetric=False).scheme.weights,
    "int8": PRESETS["int8"].scheme.weights,
    "fp8": PRESETS["fp8"].scheme.weights,
}
WEIGHT = torch.randn(24, 128, generator=torch.Generator().manual_seed(1))


def moments() -> Tensor:
    """[in, in] of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(128, 128, generator=generator) * torch.logspace(0, -2, 128).unsqueeze(1)
    x = torch.randn(512, 128, generator=generator) @ mixing
    return x.t() @ x / len(x)


def error(quantized: Quantized, hessian: Tensor) -> Tensor:
    """Of each row's output, with the damping that GPTQ uses."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMP * damped.diagonal().mean())
    lost = dequantize(quantized, torch.float32) - WEIGHT
    return ((lost @ damped) * lost).sum(dim=1)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_gets_worse_and_codes_stay(name: str, dtype: torch.dtype) -> None:
    grid, hessian = GRIDS[name], moments()
    fit = searched_scales(WEIGHT, grid, dtype, hessian.diagonal())
    for rounded in (
        gptq(WEIGHT, Inverse(hessian), fit, grid),
        round_nearest(WEIGHT, fit, grid),
    ):
        made = rescaled(WEIGHT, rounded, hessian, DAMP)
        assert torch.equal(made.codes.float(), rounded.codes.float())
        assert made.scale.dtype == rounded.scale.dtype
        before, after = error(rounded, hessian), error(made, hessian)
        assert (after <= before * (1 + 1e-5)).all()
        if name in ("int4", "int2"):
            assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize("name", ["int4", "int4-asym", "fp8"])
def test_the_scales_are_those_of_least_error(name: str) -> None:
    grid, hessian = GRIDS[name], moments()
    fit = searched_scales(WEIGHT, grid, torch.float32, hessian.diagonal())
    made = rescaled(WEIGHT, gptq(WEIGHT, Inverse(hessian), fit, grid), hessian, DAMP)
    least = error(made, hessian)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        factors = 1 + 1e-3 * torch.randn(made.scale.shape, generator=generator)
        assert (
            error(made._replace(scale=made.scale * factors), hessian) >= least * (1 - 1e-5)
        ).all()


def test_rows_are_solved_in_parts_as_they_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, hessian = GRIDS["int4"], moments()
    rounded = round_nearest(WEIGHT, searched_scales(WEIGHT, grid, torch.float32), grid)
    whole = rescaled(WEIGHT, rounded, hessian, DAMP)
    monkeypatch.setattr("tinier.quantization.rescale._NUMBERS", 700)
    parts = rescaled(WEIGHT, rounded, hessian, DAMP)
    torch.testing.assert_close(whole.scale, parts.scale)


def test_a_group_of_zero_codes_keeps_its_scale() -> None:
    grid, hessian = GRIDS["int4"], moments()
    weight = WEIGHT.clone()
    weight[:, 32:64] = 0
    rounded = round_nearest(weight, searched_scales(weight, grid, torch.bfloat16), grid)
    made = rescaled(weight, rounded, hessian, DAMP)
    assert torch.equal(made.scale[:, 1], rounded.scale[:, 1])
    assert not torch.equal(made.scale[:, 0], rounded.scale[:, 0])


def test_which_scales_are_solved_for() -> None:
    can = {name for name, preset in PRESETS.items() if can_rescale(preset.scheme.weights)}
    assert can == {"int3", "int3-best", "int2"}
