import pytest
import torch

from tinier.numerics import (
    Quantized,
    dequantize,
    expand,
    in_blocks,
    int_range,
    power_db,
    quantize_tokens_int8,
    snr_db,
    storable_scale,
)
from tinier.quantization.scales import round_nearest, searched_scales
from tinier.schemes import Grid


@pytest.mark.parametrize(
    ("bits", "ends"), [(2, (-2, 1)), (3, (-4, 3)), (4, (-8, 7)), (8, (-128, 127))]
)
def test_range_of_signed_codes(bits: int, ends: tuple[int, int]) -> None:
    assert int_range(bits) == ends


@pytest.mark.parametrize("blocks", [(1, 1), (6, 1), (6, 2), (3, 4), (1, 8)])
def test_blocks_are_expanded_as_dequantize_scales_them(blocks: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 8), generator=generator).to(torch.int8)
    scale = torch.rand(blocks, generator=generator)
    zero = torch.randint(-8, 8, blocks, generator=generator).to(torch.int8)
    over = torch.tensor([4.0])
    expected = (codes - expand(zero, codes.shape)) * expand(scale, codes.shape) / over
    values = dequantize(Quantized(codes, scale, zero, over), torch.float32)
    assert torch.allclose(values, expected)
    assert torch.equal(in_blocks(codes, blocks).reshape(6, 8), codes)


def test_tokens_have_a_scale_each() -> None:
    x = torch.tensor([[1.0, 2.0], [100.0, 50.0]])
    codes, scale, *_ = quantize_tokens_int8(x)
    assert scale.shape == (2, 1)
    assert codes.tolist() == [[64, 127], [127, 64]]


def test_snr_of_equal_tensors_is_none() -> None:
    x = torch.randn(4)
    assert snr_db(x, x) is None
    assert snr_db(x, 0.9 * x) == pytest.approx(20.0, abs=0.01)
    assert power_db(100.0, 1.0) == 20.0
    assert power_db(0.0, 1.0) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_that_underflows_is_the_smallest_there_is(dtype: torch.dtype) -> None:
    """As 1 it would turn small weights to nothing; 0 itself becomes 1, which represents it exactly."""
    wanted = torch.tensor([0.0, 1e-9, -1e-9, 1e-44, 0.5])
    stored = storable_scale(wanted, dtype)
    assert stored.dtype == dtype
    assert stored[0] == 1
    assert (stored[1:].abs() <= torch.tensor(0.5, dtype=dtype)).all()
    assert torch.equal(stored[1:].sign().float(), wanted[1:].sign())


def test_small_weights_of_a_float16_model_keep_their_meaning() -> None:
    weight = torch.linspace(-8e-8, 8e-8, 32).unsqueeze(0)
    grid = Grid(kind="int", bits=4, granularity="group", group_size=32)
    codes = round_nearest(weight, searched_scales(weight, grid, torch.float16), grid)
    assert len(codes.codes.unique()) > 2
    error = (dequantize(codes, torch.float32) - weight).abs().max()
    assert error <= 3.1e-8  # half of float16's smallest step
