import torch

from tinier.numerics import E4M3_MAX, dequantize, quantize_tokens_e4m3, round_to_e4m3


def e4m3_values() -> torch.Tensor:
    """Every finite E4M3 value from its definition: (-1)^s · 2^(e-7) · (1 + m/8), subnormal at e = 0."""
    positive = [
        (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
        if not (e == 15 and m == 7)  # NaN
    ]
    return torch.tensor(sorted({s * v for v in positive for s in (-1, 1)}))


def test_rounding_is_to_the_nearest_value_of_the_definition() -> None:
    grid = e4m3_values()
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = round_to_e4m3(weight, scale_dtype=torch.float32)
    scaled = weight / scale
    best = (scaled.unsqueeze(-1) - grid).abs().min(dim=-1).values
    assert torch.allclose((scaled - codes.float()).abs(), best, atol=1e-6)
    assert torch.isin(codes.float(), grid).all()


def test_the_largest_value_never_turns_into_nan() -> None:
    # bf16 scales round down as often as up, which pushes the largest weight past 448
    weight = torch.rand(512, 16, generator=torch.Generator().manual_seed(1)) * 1e3
    codes, _ = round_to_e4m3(weight, scale_dtype=torch.bfloat16)
    assert torch.isfinite(codes.float()).all()
    assert codes.float().abs().max() == E4M3_MAX


def test_relative_error_is_bounded_by_the_mantissa() -> None:
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(2)) + 0.5
    rounded = dequantize(quantize_tokens_e4m3(x), torch.float32)
    assert ((rounded - x).abs() / x).max() <= 2.0**-4


def test_zero_rows_stay_zero() -> None:
    codes, scale = quantize_tokens_e4m3(torch.zeros(2, 8))
    assert (codes.float() == 0).all()
    assert torch.isfinite(scale).all()
