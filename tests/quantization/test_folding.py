"""What is moved into the weights comes out of the inputs: the 16-bit model's output stays."""

from collections.abc import Callable

import pytest
import torch
from tests.conftest import FAMILIES

from tinier.calibration import DecoderWalk, observe
from tinier.checkpoint import Checkpoint
from tinier.families import geometry_of
from tinier.numerics import dequantize
from tinier.quantization.awq import awq_factors
from tinier.quantization.folding import fold, shared
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.quantization.smoothquant import smooth_factors
from tinier.ranks import Ranks
from tinier.schemes import PRESETS, preset_named

CPU = torch.device("cpu")


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_leaves_the_output_unchanged(
    tiny: Callable[..., Checkpoint],
    family: str,
    overrides: dict[str, object],
    which: int,
    dtype: torch.dtype,
) -> None:
    checkpoint = tiny(family, dtype=dtype, **overrides)
    geometry = geometry_of(checkpoint)
    walk = DecoderWalk(checkpoint, 16, CPU)
    layer = walk.load(0).float()
    hidden = torch.randn(2, 16, geometry.hidden, generator=torch.Generator().manual_seed(0))
    positions = tuple(p.float() for p in walk.positions(layer))
    before = layer(hidden, position_embeddings=positions)
    read = geometry.inputs[which]
    if read.source is None:
        pytest.skip("nothing stands before this input")
    names = geometry.linears
    weights = {name: layer.get_parameter(f"{name}.weight").float() for name in names}
    channels = weights[read.readers[0]].shape[1]
    factors = torch.rand(channels, generator=torch.Generator().manual_seed(1)) * 3 + 0.3
    if dtype == torch.bfloat16:  # the norm as it will be stored
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.data = parameter.to(dtype)
    applied = fold(layer, weights, read, shared(factors, read, geometry), geometry)
    assert applied.min() > 0
    layer.float()
    for name, weight in weights.items():
        layer.get_parameter(f"{name}.weight").data = weight
    after = layer(hidden, position_embeddings=positions)
    # bf16 norms are folded exactly too; bf16 biases of v and up are rounded once more
    exact = dtype == torch.float32 or not geometry.biases
    assert torch.allclose(before, after, rtol=0, atol=1e-4 if exact else 5e-3 * before.std())
    assert not torch.equal(before, after)


def statistics(tiny: Callable[..., Checkpoint]):  # type: ignore[no-untyped-def]
    checkpoint = tiny(hidden_size=64)
    walk = DecoderWalk(checkpoint, 32, CPU)
    windows = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    hidden = walk.embed(windows)
    layer, geometry = walk.load(0), geometry_of(checkpoint)
    names = [read.name for read in geometry.inputs]
    seen, first = observe(walk, layer, geometry, hidden, 8, Ranks(), moments=names)
    return layer, hidden, seen, first


def test_statistics_are_those_of_the_inputs(tiny: Callable[..., Checkpoint]) -> None:
    layer, hidden, seen, first = statistics(tiny)
    x = layer.input_layernorm(hidden).flatten(0, 1)
    own = seen["self_attn"]
    assert torch.allclose(own.moments, x.t() @ x / len(x), atol=1e-5)
    assert torch.allclose(own.mean_square, x.square().mean(dim=0), rtol=1e-5)
    assert torch.allclose(own.mean_abs, x.abs().mean(dim=0), rtol=1e-5)
    assert torch.equal(own.absmax, x.abs().amax(dim=0))
    assert own.sample.shape == (256, 64)
    assert first.shape == hidden.shape
    halved = own.divided_by(torch.full((64,), 2.0))
    assert torch.allclose(halved.moments, own.moments / 4)
    assert torch.allclose(halved.mean_square, own.mean_square / 4)


def test_awq_lowers_the_output_error_where_channels_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    x[:, ::32] *= 30
    weight = torch.randn(32, 64, generator=generator)
    grid = preset_named("int4", 32).scheme.weights
    factors = awq_factors(weight, x.t() @ x / 512, x.abs().mean(dim=0), grid)
    errors = []
    for s in (torch.ones(64), factors):
        scaled = weight * s
        rounded = round_nearest(scaled, absmax_scales(scaled, grid, torch.float32), grid)
        errors.append(((dequantize(rounded, torch.float32) / s - weight) @ x.t()).square().mean())
    assert errors[1] < 0.6 * errors[0]


def test_smoothquant_lowers_the_output_error_where_channels_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, :2] *= 50
    weight = torch.randn(32, 64, generator=generator)
    scheme = PRESETS["int8-sq"].scheme
    factors = smooth_factors(weight, x.abs().amax(dim=0), x, scheme)
    assert factors[:2].min() > 3 * factors[2:].median()
    even = smooth_factors(weight, torch.ones(64), torch.randn(8, 64, generator=generator), scheme)
    assert even.max() / even.min() < 10
