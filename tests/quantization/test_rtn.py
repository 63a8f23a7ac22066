import pytest
import torch

from tinier.numerics import dequantize, snr_db
from tinier.quantization.rtn import rtn
from tinier.schemes import PRESETS, preset_named


@pytest.mark.parametrize(
    ("preset", "lowest", "highest"), [("int8", 38, 46), ("fp8", 29, 34), ("int4", 15, 22)]
)
def test_noise_on_gaussian_weights_is_that_of_the_grid(
    preset: str, lowest: float, highest: float
) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    quantized = rtn(weight, PRESETS[preset].scheme.weights, torch.float32)
    assert lowest < snr_db(weight, dequantize(quantized, torch.float32)) < highest


def test_smaller_groups_lose_less() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    ratios = []
    for size in (256, 64, 16):
        grid = preset_named("int4", size).scheme.weights
        quantized = rtn(weight, grid, torch.float32)
        ratios.append(snr_db(weight, dequantize(quantized, torch.float32)))
    assert ratios == sorted(ratios)
