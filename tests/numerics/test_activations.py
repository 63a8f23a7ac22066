"""Rounded activations against compressed-tensors' own fake quantization, in float32."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus

from tinier.checkpoint import quantization_config
from tinier.kernels import round_activations, static_scale
from tinier.schemes import PRESETS, Layout

QUANTIZED = {name: p.scheme for name, p in PRESETS.items() if p.scheme.activations}


def theirs(preset: str, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    layout = Layout(schemes={"a": QUANTIZED[preset]})
    config = QuantizationConfig.model_validate(quantization_config(layout, ["a"]))
    args = config.config_groups["group_0"].input_activations
    module: Any = SimpleNamespace(
        quantization_status=QuantizationStatus.FROZEN, input_scale=scale, input_global_scale=scale
    )
    if args.strategy != "tensor_group":
        del module.input_global_scale
    return forward_quantize(module, x, "input", args)


@pytest.mark.parametrize("preset", QUANTIZED)
def test_they_are_what_compressed_tensors_makes_of_them(preset: str) -> None:
    grid = QUANTIZED[preset].activations
    assert grid is not None
    x = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(0)) * 3
    scale = static_scale(x.abs().max(), grid)
    ours, expected = round_activations(x, grid, scale), theirs(preset, x, scale)
    # absmax / 127.5 puts a token's largest INT8 value exactly between two codes: either is right
    differ = (ours - expected).abs() > 1e-5 * expected.abs().max()
    assert differ.float().mean() < (0.005 if grid.kind == "int" else 1e-9)


@pytest.mark.parametrize("preset", QUANTIZED)
def test_zeros_stay_zeros(preset: str) -> None:
    grid = QUANTIZED[preset].activations
    assert grid is not None
    x = torch.zeros(2, 256)
    assert torch.equal(round_activations(x, grid, static_scale(torch.tensor(1.0), grid)), x)
