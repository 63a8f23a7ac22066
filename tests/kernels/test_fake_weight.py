"""Fake quantization in one kernel against plain torch; on a GPU, or in Triton's interpreter."""

import pytest
import torch
from tests.kernels.test_triton import DEVICE, random

from tinier.kernels.fake_weight import gradients_cuda, rounded_cuda
from tinier.numerics import in_blocks
from tinier.quantization.scales import absmax_scales, round_scaled
from tinier.schemes import PRESETS, Grid, preset_named

GRIDS = {name: preset.scheme.weights for name, preset in PRESETS.items()}
GRIDS["int4-asym"] = preset_named("int4", 32, symmetric=False).scheme.weights
GRIDS["int4 of 96"] = preset_named("int4", 96).scheme.weights
GRIDS["int2-asym"] = preset_named("int2", 64, symmetric=False).scheme.weights


def parts(grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    columns = 1152 if grid.group_size == 96 or grid.granularity == "channel" else 256
    weight = 0.1 * random(256, columns)
    fit = absmax_scales(weight, grid, torch.bfloat16)
    zero = None if fit.zero_point is None else fit.zero_point.float()
    return 1.05 * weight, fit.step, zero  # some lie past the last code


@pytest.mark.parametrize("name", GRIDS)
def test_a_weight_is_rounded_as_it_is_written(name: str) -> None:
    grid = GRIDS[name]
    weight, step, zero = parts(grid)
    wide, zeros = step[:, None, :, None], 0.0 if zero is None else zero[:, None, :, None]
    scaled = in_blocks(weight, (step.shape[0], step.shape[1])) / wide
    codes = round_scaled(scaled, grid, None if zero is None else zero[:, None, :, None])
    expected = ((codes - zeros) * wide).reshape(weight.shape)
    assert torch.equal(rounded_cuda(weight, step, zero, grid, torch.float32), expected)
    half = rounded_cuda(weight, step, zero, grid, torch.bfloat16)
    assert torch.equal(half, expected.bfloat16())


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_plain_torch(name: str) -> None:
    grid = GRIDS[name]
    weight, step, zero = parts(grid)
    outer = random(*weight.shape, seed=1)
    moving, wide = weight.clone().requires_grad_(), step.clone().requires_grad_()
    zeros = 0.0 if zero is None else zero[:, None, :, None]
    steps = wide[:, None, :, None]
    position = in_blocks(moving, (step.shape[0], step.shape[1])) / steps + zeros
    position = position.clamp(*grid.code_range)
    codes = position + (round_scaled(position.detach(), grid) - position).detach()
    ((codes - zeros) * steps).reshape(weight.shape).backward(outer)
    to_weight, to_step = gradients_cuda(weight, step, zero, grid, outer)
    assert moving.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(to_weight, moving.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_step, wide.grad, rtol=1e-4, atol=1e-3)


def test_the_module_takes_the_kernel_on_a_gpu() -> None:
    if DEVICE == "cpu":
        pytest.skip("needs a GPU")
    from tinier.quantization import FakeWeight
    from tinier.quantization.scales import round_nearest

    grid = GRIDS["int4"]
    weight = 0.1 * random(64, 256)
    fake = FakeWeight(round_nearest(weight, absmax_scales(weight, grid, torch.float32), grid), grid)
    with torch.autocast("cuda", torch.bfloat16):
        assert fake(weight).dtype == torch.bfloat16
    assert torch.equal(fake(weight), fake.cpu()(weight.cpu()).cuda())
