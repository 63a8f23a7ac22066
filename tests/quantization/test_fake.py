from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import quantize_tiny

from tinier.checkpoint import Checkpoint
from tinier.numerics import dequantize
from tinier.quantization import FakeWeight, fake_inputs, read_targets, trainable_weight
from tinier.quantization.scales import absmax_scales, round_nearest, searched_scales
from tinier.schemes import PRESETS, Grid, preset_named

Tiny = Callable[..., Checkpoint]
GRIDS = {name: preset.scheme.weights for name, preset in PRESETS.items() if "block" not in name}
GRIDS["int4-asym"] = preset_named("int4", 32, symmetric=False).scheme.weights


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 256, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("name", GRIDS)
def test_training_starts_on_the_codes_and_ends_on_what_is_written(name: str) -> None:
    grid = GRIDS[name]
    target = weight()
    # codes that are not the nearest ones, as GPTQ makes them
    codes = round_nearest(
        target + 0.02 * weight(1), absmax_scales(target, grid, torch.bfloat16), grid
    )
    start = trainable_weight(target, codes, grid)
    fake = FakeWeight(codes, grid)
    assert torch.equal(fake(start), dequantize(codes, torch.float32))
    moved = start + 0.01 * weight(2)
    if fake.stretch is not None:
        fake.stretch.data += 0.02 * torch.randn_like(fake.stretch)
    hard = fake.harden(moved, fake.stretch)
    assert hard.scale.dtype == codes.scale.dtype
    assert torch.equal(dequantize(hard, torch.float32), fake(moved).detach())
    assert not torch.equal(hard.codes.float(), codes.codes.float())


def test_a_weight_stays_where_it_is_in_the_cell_of_its_code() -> None:
    grid = GRIDS["int4"]
    target = weight()
    nearest = round_nearest(target, absmax_scales(target, grid, torch.float32), grid)
    assert torch.allclose(trainable_weight(target, nearest, grid), target, atol=0.01 * 0.1)


@pytest.mark.parametrize("name", ["int4", "int4-asym", "fp8", "nvfp4"])
def test_gradients_pass_the_rounding_and_stop_at_the_end_of_the_grid(name: str) -> None:
    grid = GRIDS[name]
    target = weight()
    codes = round_nearest(target, absmax_scales(target, grid, torch.float32), grid)
    fake = FakeWeight(codes, grid)
    position = 0.8 * target  # the largest of a block may be past the last code
    position[0, 0] = 1e3
    position.requires_grad_()
    fake(position).sum().backward()
    assert position.grad is not None
    assert position.grad[0, 0] == 0
    assert torch.allclose(position.grad[1:], torch.ones(15, 256), atol=1e-5)


def test_the_scale_s_gradient_is_lsq_s() -> None:
    grid = Grid(kind="int", bits=4, granularity="channel")
    target = weight()
    codes = round_nearest(target, searched_scales(target, grid, torch.float32), grid)
    fake = FakeWeight(codes, grid)
    fake(target).sum().backward()
    step = codes.scale
    scaled = target / step
    inside = (scaled >= -8) & (scaled <= 7)
    # LSQ, equation 3: -w/s + round(w/s) inside, the end of the grid outside
    each = torch.where(inside, scaled.round() - scaled, scaled.clamp(-8, 7))
    assert fake.stretch is not None
    assert fake.stretch.grad is not None
    assert torch.allclose(fake.stretch.grad, each.sum(dim=1, keepdim=True) * step, atol=2e-3)


def test_inputs_are_rounded_and_gradients_are_not() -> None:
    activations = PRESETS["int8"].scheme.activations
    assert activations is not None
    x = weight().requires_grad_()
    rounded = fake_inputs(x, activations, None)
    assert not torch.equal(rounded, x)
    rounded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("preset", ["int4-awq", "fp8"])
def test_quantize_keeps_what_its_codes_stand_for(tiny: Tiny, tmp_path: Path, preset: str) -> None:
    from tests.conftest import DOCUMENTS

    from tinier.quantization import QuantizePlan, quantize

    source = tiny(dtype=torch.bfloat16)
    size = 32 if preset == "int4-awq" else None
    plan = QuantizePlan(preset=preset, group_size=size, windows=8, length=64)
    made = quantize(
        source, plan, tmp_path / "kept", text=DOCUMENTS, device="cpu", targets=tmp_path / "t"
    )
    plain = quantize_tiny(source, preset, tmp_path / "plain")
    assert made.hash == plain.hash
    targets = read_targets(tmp_path / "t", 3)
    assert len(targets) == 7
    with source.reader() as read:
        same = torch.equal(
            targets["self_attn.q_proj"], read("model.layers.3.self_attn.q_proj.weight")
        )
    assert same == (preset == "fp8")  # AWQ folds factors into the weights
