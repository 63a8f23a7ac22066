"""Each way to multiply, against the dequantized weight times the rounded activations."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import DEVICES

from tinier.kernels import StoredLinear, make_linear, native, round_activations, static_scale
from tinier.kernels.linear import (
    DenseLinear,
    Int4CpuLinear,
    Int8Linear,
    Linear,
    NativeLinear,
    WeightOnlyLinear,
    encode_tokens,
)
from tinier.kernels.reference import joined
from tinier.numerics import Quantized, dequantize
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.schemes import PRESETS, Scheme, preset_named


def rtn(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Quantized:
    grid = scheme.weights
    return round_nearest(weight, absmax_scales(weight, grid, dtype), grid)


def to_device(quantized: Quantized, device: str) -> Quantized:
    return Quantized(*(None if t is None else t.to(device) for t in quantized))  # type: ignore[arg-type]


def input_scale_of(scheme: Scheme, device: str) -> torch.Tensor | None:
    activations = scheme.activations
    if activations is None or not (scheme.static_activations or activations.scale_format == "e4m3"):
        return None
    return static_scale(torch.tensor(4.0, device=device), activations)


def build(
    preset: str,
    group_size: int | None,
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool,
    symmetric: bool | None = None,
) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    """A fused layer of two parts, its dequantized weight and its bias."""
    scheme = preset_named(preset, group_size, symmetric=symmetric).scheme
    generator = torch.Generator().manual_seed(0)
    parts, weights, biases = [], [], []
    for rows in (128, 256):
        weight = torch.randn(rows, 256, generator=generator).to(dtype)
        quantized = to_device(rtn(weight, scheme, dtype), device)
        one = torch.randn(rows, generator=generator).to(dtype).to(device) if bias else None
        parts.append(StoredLinear(quantized, one, scheme, input_scale_of(scheme, device)))
        weights.append(dequantize(quantized, dtype))
        biases.append(one)
    layer = make_linear(parts, dtype)
    joined = torch.cat([b for b in biases if b is not None]) if bias else None
    return layer, torch.cat(weights), joined


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("preset", "group_size", "symmetric"),
    [
        *((name, None, None) for name in PRESETS),
        ("int4", 64, None), ("int4", 64, False), ("int4", 16, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_every_path_computes_the_checkpoint_s_function(
    device: str,
    preset: str,
    group_size: int | None,
    symmetric: bool | None,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int,
    bias: bool,
) -> None:
    layer, weight, added = build(preset, group_size, dtype, device, bias=bias, symmetric=symmetric)
    scheme = preset_named(preset, group_size).scheme
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    scale = input_scale_of(scheme, device)
    rounded = round_activations(x, scheme.activations, scale) if scheme.activations else x
    if layer.takes:  # a GPU may round a tie elsewhere: test_triton.py
        codes, scales, *_ = encode_tokens(x, layer.takes)
        rounded = codes.double() * scales
    expected = F.linear(
        rounded.double(), weight.double(), None if added is None else added.double()
    )
    out = joined(layer(x), dtype)
    assert (out.double() - expected).norm() / expected.norm() < tolerance
    assert out.dtype == dtype


def test_the_path_is_chosen_at_load_and_named() -> None:
    int8, _, _ = build("int8", None, torch.bfloat16, "cpu", bias=False)
    assert isinstance(int8, Int8Linear)
    assert int8.fast
    int4, _, _ = build("int4", 64, torch.bfloat16, "cpu", bias=False)
    without_compiler = isinstance(native.load_library(), str)
    assert isinstance(int4, Int4CpuLinear if without_compiler else NativeLinear)
    fp8, _, _ = build("fp8", None, torch.bfloat16, "cpu", bias=False)
    assert isinstance(fp8, DenseLinear if without_compiler else NativeLinear)
    mxfp4, _, _ = build("mxfp4", None, torch.bfloat16, "cpu", bias=False)
    assert isinstance(mxfp4, DenseLinear)
    assert not mxfp4.fast
    assert mxfp4.path.endswith("expanded to bfloat16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_path_of_int4() -> None:
    int4, _, _ = build("int4", 64, torch.bfloat16, "cuda", bias=False)
    assert isinstance(int4, WeightOnlyLinear)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
@pytest.mark.parametrize("preset", ["fp8", "int8"])
def test_rows_that_16_does_not_divide(preset: str, tokens: int) -> None:
    """A vocabulary of 32,001: cuBLASLt's products, of more than 64 tokens, take whole sixteens alone."""
    scheme = preset_named(preset, None).scheme
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32_001, 512, generator=generator).bfloat16()
    quantized = to_device(rtn(weight, scheme, torch.bfloat16), "cuda")
    layer = make_linear([StoredLinear(quantized, None, scheme)], torch.bfloat16)
    x = torch.randn(tokens, 512, generator=generator).bfloat16().cuda()
    assert layer.takes is not None
    codes, scales, *_ = encode_tokens(x, layer.takes)
    expected = (codes.double() * scales) @ dequantize(quantized, torch.bfloat16).double().t()
    out = joined(layer(x), torch.bfloat16)
    assert out.shape == (tokens, 32_001)
    assert (out.double() - expected).norm() / expected.norm() < 8e-3
    assert (layer.float32(x).double() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("preset", ["fp8", "int8", "int4"])
def test_parts_of_a_fused_layer_may_be_left_in_16_bit(preset: str, left_out: int) -> None:
    scheme = preset_named(preset, 64 if preset == "int4" else None).scheme
    parts, expected = [], []
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    for i, rows in enumerate((96, 32)):
        weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(i))
        if i == left_out:
            parts.append(StoredLinear(weight, None))
            expected.append(x @ weight.t())
            continue
        quantized = rtn(weight, scheme, torch.float32)
        parts.append(StoredLinear(quantized, None, scheme))
        rounded = round_activations(x, scheme.activations) if scheme.activations else x
        expected.append(rounded @ dequantize(quantized, torch.float32).t())
    layer = make_linear(parts, torch.float32)
    assert torch.allclose(layer(x), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-3)
    assert "16-bit matmul" in layer.path


def test_bytes_are_those_of_the_codes() -> None:
    int8, weight, _ = build("int8", None, torch.bfloat16, "cpu", bias=False)
    assert int8.num_bytes == weight.numel() + 4 * weight.shape[0]
    int4, _, _ = build("int4", 64, torch.bfloat16, "cpu", bias=False)
    # half a byte a weight and a 16-bit scale for each 64; torch's layout has a zero beside it
    scale_bytes = 2 if isinstance(int4, NativeLinear) else 4
    assert int4.num_bytes == weight.numel() // 2 + scale_bytes * weight.numel() // 64
