"""The matrix product for few tokens against float64, in every format and with odd sizes, on a GPU."""

import pytest
import torch

from tinier.kernels.reference import joined

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")
from tinier.kernels import skinny
from tinier.kernels.skinny import Tiling, Weight

pytestmark = pytest.mark.gpu
SHAPES = [(320, 512), (5120, 3072), (200, 576), (64, 160)]


def made(kind: str, rows: int, columns: int, group: int = 64) -> tuple[Weight, torch.Tensor]:
    """A random weight and what it stands for, in float64."""
    bias = torch.randn(rows, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(rows, columns, device="cuda")
    if kind == "bf16":
        stored = weight.bfloat16()
        return Weight(stored, None, bias, (rows, columns)), stored.double()
    scale = torch.rand(rows, device="cuda") + 0.5
    if kind in ("fp8", "fp8-weights", "e5m2-weights"):
        codes = weight.to(torch.float8_e5m2 if kind.startswith("e5m2") else torch.float8_e4m3fn)
        return Weight(codes, scale, bias, (rows, columns)), codes.double() * scale.double()[:, None]
    if kind == "int8":
        codes = (weight * 40).round().clamp(-128, 127).to(torch.int8)
        return Weight(codes, scale, bias, (rows, columns)), codes.double() * scale.double()[:, None]
    codes = torch.randint(-8, 8, (rows, columns), device="cuda", dtype=torch.int8)
    steps = (torch.rand(columns // group, rows, device="cuda") + 0.5).bfloat16()
    plain = codes.double() * steps.double().t().repeat_interleave(group, dim=1)
    return Weight(skinny.pack_int4(codes), steps, bias, (rows, columns), group), plain


def inputs(kind: str, tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.randn(tokens, columns, device="cuda")
    scale = torch.rand(tokens, 1, device="cuda") + 0.5
    if kind == "fp8":
        return x.to(torch.float8_e4m3fn), scale
    if kind == "int8":
        return (x * 40).round().clamp(-128, 127).to(torch.int8), scale
    return x.bfloat16(), None


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8-weights", "e5m2-weights", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 64, 130, 700])
def test_products_are_those_of_float64(kind: str, shape: tuple[int, int], tokens: int) -> None:
    if tokens > skinny.MOST_TOKENS and kind != "int4":
        pytest.skip("this many tokens go another way")
    rows, columns = shape
    weight, plain = made(kind, rows, columns, group=64 if columns % 64 == 0 else 32)
    x, scale = inputs(kind, tokens, columns)
    exact = x.double() @ plain.t() * (1 if scale is None else scale.double())
    assert weight.bias is not None
    exact += weight.bias.double()
    chosen = skinny.tiling_for(weight, tokens)
    for tiling in (chosen, chosen._replace(splits=1), chosen._replace(splits=3)):
        out = joined(skinny.matmul(x, scale, weight, tiling), torch.bfloat16)
        assert ((out.double() - exact).norm() / exact.norm()).item() < 3e-3


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_int4_groups(group: int) -> None:
    weight, plain = made("int4", 256, 512, group)
    x, _ = inputs("int4", 9, 512)
    assert weight.bias is not None
    exact = x.double() @ plain.t() + weight.bias.double()
    out = joined(skinny.matmul(x, None, weight, Tiling(64, 128, 2, 3)), torch.bfloat16)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 3e-3
    assert torch.allclose(skinny.expand(weight).double(), plain, rtol=4e-3, atol=0)


def test_expanded_8_bit_floats_are_codes_times_scale() -> None:
    weight, plain = made("e5m2-weights", 64, 96)
    assert torch.allclose(skinny.expand(weight).double(), plain, rtol=4e-3, atol=0)
