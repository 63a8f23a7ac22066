import pytest
import torch

from tinier.numerics import dequantize, int_range, quantize_tokens_int8, round_to_int, snr_db


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 64])
def test_error_is_at_most_half_a_step(bits: int, group_size: int | None) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits))
    quantized = round_to_int(weight, bits=bits, group_size=group_size, scale_dtype=torch.float32)
    step = quantized.scale.repeat_interleave(64 // quantized.scale.shape[1], dim=1)
    error = (dequantize(quantized, torch.float32) - weight).abs()
    assert (error <= 0.5 * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_stay_on_the_grid_and_use_its_end(bits: int) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    codes = round_to_int(weight, bits=bits, group_size=None, scale_dtype=torch.float32).codes
    lowest, highest = int_range(bits)
    assert codes.min() >= lowest
    assert codes.max() <= highest
    assert codes.int().abs().amax(dim=1).min() >= highest


def test_codes_are_the_nearest_for_the_scale_that_is_stored() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    codes, scale = round_to_int(weight, bits=8, group_size=None, scale_dtype=torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    grid = torch.arange(-128, 128) * scale.float().unsqueeze(-1)  # [16, 1, 256]
    nearest = (weight.unsqueeze(-1) - grid).abs().argmin(dim=-1) - 128
    # a value exactly between two codes may go either way
    assert ((codes - nearest).abs() <= 1).all()
    assert (codes == nearest).float().mean() > 0.999


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_groups_stay_zero(scale_dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 32)
    weight[0, :16] = 1.0
    quantized = round_to_int(weight, bits=4, group_size=16, scale_dtype=scale_dtype)
    rounded = dequantize(quantized, torch.float32)
    assert torch.isfinite(rounded).all()
    assert (rounded[1:] == 0).all()
    assert (rounded[0, 16:] == 0).all()


def test_each_bit_is_worth_about_six_decibels() -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3))
    eight, four = (
        dequantize(
            round_to_int(weight, bits=bits, group_size=128, scale_dtype=torch.float32),
            torch.float32,
        )
        for bits in (8, 4)
    )
    gain = snr_db(weight, eight) - snr_db(weight, four)
    assert 22 < gain < 27


def test_tokens_have_a_scale_each() -> None:
    x = torch.tensor([[1.0, 2.0], [100.0, 50.0]])
    codes, scale = quantize_tokens_int8(x)
    assert scale.shape == (2, 1)
    assert codes.tolist() == [[64, 127], [127, 64]]


def test_snr_of_equal_tensors_is_infinite() -> None:
    x = torch.randn(4)
    assert snr_db(x, x) == float("inf")
    assert snr_db(x, 0.9 * x) == pytest.approx(20.0, abs=0.01)
