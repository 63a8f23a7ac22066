import pytest
import torch

from tinier.errors import InputError
from tinier.numerics import dequantize, expand
from tinier.quantization.gptq import DAMP, Inverse, _round_block_gpu, gptq, round_block
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.schemes import PRESETS, preset_named

NAMES = [name for name in PRESETS if "-" not in name]


def correlated(channels: int, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, channels] with few directions that carry most of the power."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    mixing *= torch.logspace(0, -2, channels).unsqueeze(1)
    return torch.randn(tokens, channels, generator=generator) @ mixing


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_hessian_gives_round_to_nearest(name: str) -> None:
    grid = PRESETS[name].scheme.weights
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    fit = absmax_scales(weight, grid, torch.bfloat16)
    quantized = gptq(weight, Inverse(torch.eye(256)), fit, grid)
    nearest = round_nearest(weight, fit, grid)
    assert torch.equal(quantized.codes.float(), nearest.codes.float())
    assert torch.equal(quantized.scale.float(), nearest.scale.float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_beats_round_to_nearest_on_correlated_inputs(name: str, symmetric: bool) -> None:
    if not symmetric and name not in ("int4", "int3", "int2"):
        pytest.skip("the grid has no zero points")
    grid = preset_named(name, symmetric=None if symmetric else False).scheme.weights
    x = correlated(256)
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(2))
    fit = absmax_scales(weight, grid, torch.bfloat16)
    inverse = Inverse(x.t() @ x / len(x))
    errors = [
        ((dequantize(q, torch.float32) - weight) @ x.t()).square().sum().item()
        for q in (gptq(weight, inverse, fit, grid), round_nearest(weight, fit, grid))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = preset_named("int4", 32).scheme.weights
    x = correlated(96)
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))
    fit, inverse = absmax_scales(weight, grid, torch.float32), Inverse(x.t() @ x)
    whole = gptq(weight, inverse, fit, grid)
    monkeypatch.setattr("tinier.quantization.gptq._BLOCK", 32)
    parts = gptq(weight, inverse, fit, grid)
    assert (whole.codes == parts.codes).float().mean() > 0.999  # sums in another order


def test_columns_without_input_become_zero_and_disturb_nothing() -> None:
    grid = preset_named("int4", 32).scheme.weights
    x = correlated(64)
    x[:, 5] = 0.0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    fit = absmax_scales(weight, grid, torch.float32)
    codes = gptq(weight, Inverse(x.t() @ x / len(x)), fit, grid).codes
    assert (codes[:, 5] == 0).all()
    assert (codes != 0).any(dim=0).sum() == 63


def test_a_hessian_that_is_not_positive_definite_gets_more_damping() -> None:
    assert Inverse(torch.eye(8)).damp == DAMP
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    assert Inverse(indefinite).damp > DAMP
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    with pytest.raises(InputError, match="cannot invert the second moments"):
        Inverse(indefinite)


@pytest.mark.parametrize(
    "name", [n if n == "int4" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_the_gpu_kernel_rounds_as_the_loop_does(kernel_device: str, name: str) -> None:
    grid = PRESETS[name].scheme.weights
    x = correlated(128).to(kernel_device)
    weight = torch.randn(100, 128, generator=torch.Generator().manual_seed(5)).to(kernel_device)
    fit = absmax_scales(weight, grid, torch.bfloat16)
    step = expand(fit.step, weight.shape)
    upper = Inverse(x.t() @ x / len(x)).upper
    ours = _round_block_gpu(weight, step, None, upper, grid)
    loop = round_block(weight, step, None, upper, grid)
    # a quotient that is off by its last bit can fall on the other side of a tie, and moves the rest
    assert (ours[0] == loop[0]).float().mean() > 0.99
