"""Each way to multiply, against the dequantized weight times the rounded activations."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import DEVICES

from tinier.checkpoint import pack_linear
from tinier.kernels import StoredLinear, make_linear
from tinier.kernels.linear import (
    DenseLinear,
    Int4CpuLinear,
    Int4CudaLinear,
    Int8Linear,
    Linear,
    dequantize_tokens,
)
from tinier.numerics import dequantize
from tinier.quantization.rtn import rtn
from tinier.schemes import preset_named


def build(
    preset: str, group_size: int | None, dtype: torch.dtype, device: str, *, bias: bool
) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    """A fused layer of two parts, its dequantized weight and its bias."""
    scheme = preset_named(preset, group_size).scheme
    generator = torch.Generator().manual_seed(0)
    parts, weights, biases = [], [], []
    for rows in (96, 32):
        weight = torch.randn(rows, 256, generator=generator).to(dtype)
        quantized = rtn(weight, scheme.weights, dtype)
        tensors = {k: v.to(device) for k, v in pack_linear(quantized, scheme).items()}
        one = torch.randn(rows, generator=generator).to(dtype).to(device) if bias else None
        stored = tensors.get("weight", tensors.get("weight_packed"))
        assert stored is not None
        parts.append(StoredLinear(stored, tensors["weight_scale"], one))
        weights.append(dequantize(quantized, dtype).to(device))
        biases.append(one)
    layer = make_linear(parts, scheme, dtype)
    joined = torch.cat([b for b in biases if b is not None]) if bias else None
    return layer, torch.cat(weights), joined


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("preset", "group_size"), [("fp8", None), ("int8", None), ("int4", 64), ("int4", 16)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_every_path_computes_the_checkpoint_s_function(
    device: str,
    preset: str,
    group_size: int | None,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int,
    bias: bool,
) -> None:
    layer, weight, added = build(preset, group_size, dtype, device, bias=bias)
    scheme = preset_named(preset, group_size).scheme
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    rounded = dequantize_tokens(x, scheme.activations) if scheme.activations else x
    expected = F.linear(
        rounded.double(), weight.double(), None if added is None else added.double()
    )
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < tolerance
    assert layer(x).dtype == dtype


def test_the_path_is_chosen_at_load_and_named() -> None:
    int8, _, _ = build("int8", None, torch.bfloat16, "cpu", bias=False)
    assert isinstance(int8, Int8Linear)
    assert int8.fast
    int4, _, _ = build("int4", 64, torch.bfloat16, "cpu", bias=False)
    assert isinstance(int4, Int4CpuLinear)
    fp8, _, _ = build("fp8", None, torch.bfloat16, "cpu", bias=False)
    assert isinstance(fp8, DenseLinear)
    assert not fp8.fast
    assert fp8.path == "FP8 W8A8 expanded to bfloat16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_path_of_int4() -> None:
    int4, _, _ = build("int4", 64, torch.bfloat16, "cuda", bias=False)
    assert isinstance(int4, Int4CudaLinear)


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("preset", ["fp8", "int8", "int4"])
def test_parts_of_a_fused_layer_may_be_left_in_16_bit(preset: str, left_out: int) -> None:
    scheme = preset_named(preset, 64 if preset == "int4" else None).scheme
    parts, expected = [], []
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    for i, rows in enumerate((96, 32)):
        weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(i))
        if i == left_out:
            parts.append(StoredLinear(weight, None, None))
            expected.append(x @ weight.t())
            continue
        quantized = rtn(weight, scheme.weights, torch.float32)
        stored = list(pack_linear(quantized, scheme).values())
        parts.append(StoredLinear(stored[0], stored[1], None))
        rounded = dequantize_tokens(x, scheme.activations) if scheme.activations else x
        expected.append(rounded @ dequantize(quantized, torch.float32).t())
    layer = make_linear(parts, scheme, torch.float32)
    assert torch.allclose(layer(x), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-3)
    assert "16-bit matmul" in layer.path


def test_bytes_are_those_of_the_codes() -> None:
    int8, weight, _ = build("int8", None, torch.bfloat16, "cpu", bias=False)
    assert int8.num_bytes == weight.numel() + 4 * weight.shape[0]
    int4, _, _ = build("int4", 64, torch.bfloat16, "cpu", bias=False)
    assert int4.num_bytes == weight.numel() // 2 + 4 * weight.numel() // 64
