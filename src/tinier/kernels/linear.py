"""How a stored linear layer is multiplied on the device at hand.

Start at `make_linear`. In: the stored tensors of one or more linear layers that share an input
(q, k and v; gate and up), in compressed-tensors' layout. Out: one module over the rows of all of
them. The choice is made once, at load; `path` names it, and `fast` says whether the device has
arithmetic for the scheme or the codes were expanded to 16 bit.

Every path rounds the activations to the grid that the scheme asks for, so that its result is the
checkpoint's, not the device's.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

from tinier.numerics import (
    Quantized,
    dequantize,
    quantize_tokens_e4m3,
    quantize_tokens_int8,
)
from tinier.schemes import Grid, Scheme

# torch's packed INT4 kernels take these group sizes
_INT4_GROUPS = (32, 64, 128, 256)


class StoredLinear(NamedTuple):
    """One linear layer as the checkpoint has it."""

    weight: Tensor
    """[out, in] in 16 or 32 bit, int8 or float8; or packed int32 [out, in·bits/32]"""
    scale: Tensor | None
    """[out, groups]; None where the weight is not quantized"""
    bias: Tensor | None
    """[out]"""


class Linear(ABC):
    """A linear layer that knows how it is multiplied."""

    path: str = "16-bit matmul"
    fast: bool = True

    def __init__(self, bias: Tensor | None) -> None:
        self.bias = bias

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in]. Returns [T, out]."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer holds in memory."""
        tensors = [t for t in vars(self).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class DenseLinear(Linear):
    """A weight in the computing type, with the activations rounded first where the scheme says so."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activations: Grid | None) -> None:
        super().__init__(bias)
        self.weight = weight  # [out, in]
        self.activations = activations

    def __call__(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = dequantize_tokens(x, self.activations)
        return F.linear(x, self.weight, self.bias)


class Int8Linear(Linear):
    """INT8 weights and activations multiplied in integers: out = (codes_x · codes_w) · s_x · s_w."""

    path = "torch._int_mm"
    # cuBLASLt takes INT8 with more than 16 rows only
    _CUDA_ROWS = 32

    def __init__(self, quantized: Quantized, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.codes = quantized.codes.t()  # [in, out], a view of the stored rows
        self.scale = quantized.scale.float().squeeze(-1)  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        tokens = quantize_tokens_int8(x)
        codes = tokens.codes
        rows = codes.shape[0]
        if codes.is_cuda and rows < self._CUDA_ROWS:
            codes = F.pad(codes, (0, 0, 0, self._CUDA_ROWS - rows))
        product = torch._int_mm(codes, self.codes)[:rows]
        out = (product.float() * tokens.scale * self.scale).to(x.dtype)
        return out if self.bias is None else out + self.bias


class Fp8Linear(Linear):
    """FP8 weights and activations multiplied on tensor cores, one scale per row of each."""

    path = "torch._scaled_mm"

    def __init__(self, quantized: Quantized, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.codes = quantized.codes.t()  # [in, out], column-major as cuBLASLt wants it
        self.scale = quantized.scale.float().t().contiguous()  # [1, out]

    def __call__(self, x: Tensor) -> Tensor:
        tokens = quantize_tokens_e4m3(x)
        return torch._scaled_mm(
            tokens.codes, self.codes, tokens.scale, self.scale, bias=self.bias, out_dtype=x.dtype
        )


class Int4CpuLinear(Linear):
    """INT4 weights unpacked inside the matmul, 16-bit activations."""

    path = "aten::_weight_int4pack_mm_for_cpu"

    def __init__(self, quantized: Quantized, group_size: int, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.group_size = group_size
        unsigned = (quantized.codes.int() + 8).contiguous()  # [out, in], 0..15
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        self.scale_and_zero = _scale_and_zero(quantized.scale)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scale_and_zero
        )
        return out if self.bias is None else out + self.bias


class Int4CudaLinear(Linear):
    """INT4 weights unpacked inside torch's tensor-core matmul, bf16 activations."""

    path = "aten::_weight_int4pack_mm"

    def __init__(self, quantized: Quantized, group_size: int, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.group_size = group_size
        unsigned = quantized.codes + 8
        pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)  # [out, in/2]
        self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        self.scale_and_zero = _scale_and_zero(quantized.scale)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm(
            x, self.packed, self.group_size, self.scale_and_zero
        )
        return out if self.bias is None else out + self.bias


class StackedLinear(Linear):
    """Parts that share an input and are stored in different ways, one after the other."""

    def __init__(self, parts: list[Linear]) -> None:
        super().__init__(None)
        self.parts = parts
        self.path = " + ".join(dict.fromkeys(part.path for part in parts))
        self.fast = all(part.fast for part in parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def make_linear(parts: list[StoredLinear], scheme: Scheme | None, dtype: torch.dtype) -> Linear:
    """One layer over the stacked rows of `parts`, on the device that their tensors are on.

    dtype: what the decoder computes in. scheme: that of the parts that have a scale; a checkpoint
    may leave some of them in 16 bit.
    """
    if len({part.scale is None for part in parts}) > 1:
        return StackedLinear([make_linear([part], scheme, dtype) for part in parts])
    bias = _stack([p.bias for p in parts if p.bias is not None], dtype)
    if scheme is None or parts[0].scale is None:
        weight = _stack([p.weight for p in parts], dtype)
        assert weight is not None
        return DenseLinear(weight, bias, None)
    quantized = _codes(parts, scheme)
    device = quantized.codes.device.type
    grid, group_size = scheme.weights, scheme.weights.group_size
    if grid.kind == "int" and grid.bits == 8 and scheme.activations and not group_size:
        return Int8Linear(quantized, bias)
    if grid.kind == "float" and scheme.activations and _has_fp8(device) and dtype == torch.bfloat16:
        return Fp8Linear(quantized, bias)
    packable = grid.bits == 4 and group_size in _INT4_GROUPS and dtype == torch.bfloat16
    if packable and not scheme.activations:
        rows, columns = quantized.codes.shape
        if device == "cpu" and rows % 16 == 0:
            return Int4CpuLinear(quantized, group_size or columns, bias)
        if device == "cuda" and rows % 8 == 0 and columns % 128 == 0:
            return Int4CudaLinear(quantized, group_size or columns, bias)
    dense = DenseLinear(dequantize(quantized, dtype), bias, scheme.activations)
    dense.fast = False
    dense.path = f"{scheme.label} expanded to {str(dtype).removeprefix('torch.')}"
    return dense


def dequantize_tokens(x: Tensor, grid: Grid) -> Tensor:
    """x rounded to the per-token grid and back, in x's type."""
    tokens = quantize_tokens_int8(x) if grid.kind == "int" else quantize_tokens_e4m3(x)
    return (tokens.codes.float() * tokens.scale).to(x.dtype)


def _codes(parts: list[StoredLinear], scheme: Scheme) -> Quantized:
    codes = []
    for weight, scale, _ in parts:
        assert scale is not None
        if scheme.weights.bits == 8:
            codes.append(weight)
            continue
        group_size = scheme.weights.group_size
        assert group_size is not None
        shape = torch.Size((weight.shape[0], scale.shape[1] * group_size))
        codes.append(unpack_from_int32(weight, scheme.weights.bits, shape))
    return Quantized(torch.cat(codes), torch.cat([p.scale for p in parts if p.scale is not None]))


def _scale_and_zero(scale: Tensor) -> Tensor:
    """torch's layout [groups, out, 2]: (code - 8) · scale + zero, with zero 0 for a symmetric grid."""
    scale = scale.to(torch.bfloat16).t()
    return torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()


def _stack(tensors: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    return torch.cat(tensors).to(dtype) if tensors else None


def _has_fp8(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
