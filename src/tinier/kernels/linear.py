"""How a stored linear layer is multiplied on the device at hand.

Start at `make_linear`. In: the weights of one or more linear layers that share an input (q, k and v;
gate and up), as the checkpoint has them. Out: one module over the rows of all of them. The choice is
made once, at load; `path` names it, and `fast` says whether the device has arithmetic for the scheme
or the codes were expanded to 16 bit.

Every path rounds the activations to the grid that the scheme asks for, so that its result is the
checkpoint's, not the device's.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.kernels import native
from tinier.kernels.machine import HAS_TRITON, Machine, machine_of
from tinier.kernels.native import NativeWeight, load_library
from tinier.kernels.operators import uses_triton
from tinier.kernels.reference import joined
from tinier.numerics import (
    E2M1_MAX,
    E4M3_MAX,
    Quantized,
    cast_e4m3,
    dequantize,
    invertible,
    quantize_tokens_e4m3,
    quantize_tokens_int8,
    round_groups_e4m3,
    round_groups_mxfp4,
    round_groups_nvfp4,
    round_static,
    step_size,
)
from tinier.schemes import Grid, Int4Inputs, Scheme

if HAS_TRITON:
    from tinier.kernels import int8, skinny
    from tinier.kernels.fused import encode_rows

# what the packed INT4 kernels take
_INT4_GROUPS = (32, 64, 128, 256)
Path = Literal[
    "int8", "fp8", "8-bit native", "weight-only 8-bit", "weight-only int4", "int4 native", "int4 torch",
    "expanded",
]  # fmt: skip


class StoredLinear(NamedTuple):
    """One linear layer as the checkpoint has it."""

    weight: Tensor | Quantized
    """[out, in] in 16 or 32 bit, or codes and scales"""
    bias: Tensor | None
    """[out]"""
    scheme: Scheme | None = None
    """How a quantized weight is stored"""
    input_scale: Tensor | None = None
    """[1], of static activations"""


class Linear(ABC):
    """A linear layer that knows how it is multiplied."""

    path: str = "16-bit matmul"
    fast: bool = True
    takes: str | None = None
    """`e4m3` or `int8`: inputs may come with one scale per token, made by the operator before"""
    few: "skinny.Weight | None" = None
    """The weight as the Triton kernels for few tokens read it, where they do"""

    def __init__(self, bias: Tensor | None) -> None:
        self.bias = bias

    @abstractmethod
    def __call__(self, x: Tensor | Quantized) -> Tensor:
        """x: [T, in], or its codes if the layer takes them.

        Returns [T, out], 16-bit or as x; for few tokens on a GPU it may be parts [S, T, out] in float32,
        which the operator that reads them sums (skinny.py).
        """

    def prepared(self, x: Tensor | Quantized) -> Tensor | Quantized:
        """Inputs [T, in] as they are multiplied with the weight: rounded, or codes with a scale a token."""
        return x

    def float32(self, x: Tensor) -> Tensor:
        """The product of x [T, in], [T, out] in float32, not rounded after it was summed: for measuring,
        where a rounded logit decides which token is first."""
        return joined(self(x), torch.float32).float()

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer holds in memory."""
        tensors = [t for t in vars(self).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class RoundingLinear(Linear):
    """One that multiplies 16-bit inputs, rounded first where the scheme says so."""

    def __init__(
        self, bias: Tensor | None, activations: Grid | None, input_scale: Tensor | None
    ) -> None:
        super().__init__(bias)
        self.activations = activations
        self.input_scale = input_scale

    def prepared(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        if self.activations is None:
            return x
        return round_activations(x, self.activations, self.input_scale)


class DenseLinear(RoundingLinear):
    """A weight in the computing type."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activations: Grid | None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__(bias, activations, input_scale)
        self.weight = weight  # [out, in]
        if _has_skinny(weight.device) and weight.dtype == torch.bfloat16:
            self.few = skinny.Weight(weight, None, bias, _sides(weight))
            self.path = f"16-bit: Triton to {skinny.MOST_TOKENS} tokens, F.linear above"

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        x = self.prepared(x)
        if self.few is not None and x.shape[0] <= skinny.MOST_TOKENS:
            return skinny.matmul(x, None, self.few)
        return F.linear(x, self.weight, self.bias)

    def float32(self, x: Tensor) -> Tensor:
        return _product_float32(self.prepared(x), self.weight, self.bias)


class Int8Linear(Linear):
    """INT8 weights and activations multiplied in integers: out = (codes_x · codes_w) · s_x · s_w."""

    path = "torch._int_mm"
    takes = "int8"
    # cuBLASLt takes INT8 with more than 16 rows only
    _CUDA_ROWS = 32

    def __init__(self, quantized: Quantized, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(bias)
        self.dtype = dtype  # of the result
        self.codes = _whole_rows(quantized.codes).t()  # [in, out], a view of the stored rows
        self.scale = quantized.scale.float().squeeze(-1)  # [out]
        if _has_skinny(quantized.codes.device):
            self.path = "INT8: Triton"
            if dtype == torch.bfloat16:
                self.few = skinny.Weight(self._rows, self.scale, bias, _sides(self._rows))

    @property
    def _rows(self) -> Tensor:
        """The codes [out, in], without what fills them up."""
        return self.codes.t()[: len(self.scale)]

    def prepared(self, x: Tensor | Quantized) -> Quantized:
        return x if isinstance(x, Quantized) else encode_tokens(x, "int8")

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        tokens = self.prepared(x)
        if self.few is not None and tokens.codes.shape[0] <= skinny.MOST_TOKENS:
            return skinny.matmul(tokens.codes, tokens.scale, self.few)
        if uses_triton(tokens.codes.device):
            return int8.matmul(*tokens[:2], self._rows, self.scale, self.bias, self.dtype)
        out = self._scaled(tokens).to(self.dtype)
        return out if self.bias is None else out + self.bias

    def float32(self, x: Tensor) -> Tensor:
        out = self._scaled(self.prepared(x))
        return out if self.bias is None else out + self.bias.float()

    def _scaled(self, tokens: Quantized) -> Tensor:
        """The product in float32, without the bias."""
        product = self._product(tokens.codes)
        return product[:, : len(self.scale)].float() * tokens.scale * self.scale

    def _product(self, codes: Tensor) -> Tensor:
        """[T, out or more] in integers."""
        rows = codes.shape[0]
        if codes.is_cuda and rows < self._CUDA_ROWS:
            codes = F.pad(codes, (0, 0, 0, self._CUDA_ROWS - rows))
        if codes.is_cuda or torch.cpu._is_vnni_supported():
            return torch._int_mm(codes, self.codes)[:rows]
        # four times as fast there; sums past 2^24 lose their last bit
        return codes.float() @ self.codes.float()


class Fp8Linear(Linear):
    """FP8 weights and activations multiplied on tensor cores, one scale per row of each."""

    path = "torch._scaled_mm"

    def __init__(
        self, quantized: Quantized, bias: Tensor | None, input_scale: Tensor | None
    ) -> None:
        super().__init__(bias)
        self.rows = len(quantized.codes)
        codes = _whole_rows(quantized.codes)
        self.codes = codes.t()  # [in, out], column-major as cuBLASLt wants it
        scale = F.pad(quantized.scale.float(), (0, 0, 0, len(codes) - self.rows))
        self.scale = scale.t().contiguous()  # [1, out]
        self._bias = None if bias is None else F.pad(bias, (0, len(codes) - self.rows))
        self.input_scale = None if input_scale is None else input_scale.float().reshape(1, 1)
        self.takes = "e4m3" if input_scale is None else None
        if _has_skinny(quantized.codes.device):
            rows = self.scale.squeeze(0)[: self.rows]
            codes = codes[: self.rows]
            self.few = skinny.Weight(codes, rows, bias, _sides(codes))
            self.path = f"FP8: Triton to {skinny.MOST_TOKENS} tokens, torch._scaled_mm above"

    def float32(self, x: Tensor) -> Tensor:
        tokens = self.prepared(x)
        # bf16 holds every code, and products of codes are exact in float32
        codes, weight = tokens.codes.bfloat16(), self.codes.t().bfloat16()
        out = (_product_float32(codes, weight, None) * tokens.scale * self.scale)[:, : self.rows]
        return out if self.bias is None else out + self.bias.float()

    def prepared(self, x: Tensor | Quantized) -> Quantized:
        if isinstance(x, Quantized):
            return x
        if self.input_scale is None:
            return encode_tokens(x, "e4m3")
        scale = self.input_scale.expand(x.shape[0], 1).contiguous()
        return Quantized(cast_e4m3(x.float() / self.input_scale), scale)

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        tokens = self.prepared(x)
        if self.few is not None and tokens.codes.shape[0] <= skinny.MOST_TOKENS:
            return skinny.matmul(tokens.codes, tokens.scale, self.few)
        out = torch._scaled_mm(
            tokens.codes,
            self.codes,
            tokens.scale,
            self.scale,
            bias=self._bias,
            out_dtype=torch.bfloat16,
            # sums of products keep fewer bits inside the tensor core, as in vLLM's kernels: far below
            # what rounding to FP8 costs
            use_fast_accum=True,
        )
        return out if out.shape[1] == self.rows else out[:, : self.rows].contiguous()


class NativeLinear(Linear):
    """INT4 or 8 bits, multiplied in native code (cpu_decode.cpp) as the native step does."""

    def __init__(self, weight: NativeWeight, label: str) -> None:
        super().__init__(weight.bias)
        self.weight = weight
        self.path = label

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        return self.weight.product(x)

    def float32(self, x: Tensor) -> Tensor:
        return self.weight.product(x, exact=True)


class Int4CpuLinear(Linear):
    """INT4 weights unpacked inside the matmul, 16-bit activations."""

    path = "aten::_weight_int4pack_mm_for_cpu"

    def __init__(self, quantized: Quantized, group_size: int, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.group_size = group_size
        unsigned = (quantized.codes.int() + 8).contiguous()  # [out, in], 0..15
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        self.scale_and_zero = _scale_and_zero(quantized)

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scale_and_zero
        )
        return out if self.bias is None else out + self.bias


class WeightOnlyLinear(Linear):
    """8-bit float or INT4 weights expanded inside Triton's matmul for few tokens; for many they are
    expanded to bf16 beforehand, which then costs little beside the product."""

    def __init__(self, weight: "skinny.Weight", label: str) -> None:
        super().__init__(weight.bias)
        self.weight = self.few = weight
        self._most = skinny.MOST_INT4_TOKENS if weight.group_size else skinny.MOST_TOKENS
        self.path = f"{label}: Triton to {self._most} tokens, expanded for F.linear above"

    @property
    def num_bytes(self) -> int:
        tensors = [self.weight.codes, self.weight.scale, self.bias]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        if x.shape[0] <= self._most:
            return skinny.matmul(x, None, self.weight)
        return F.linear(x, skinny.expand(self.weight), self.bias)


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

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        return torch.cat([joined(part(x), x.dtype) for part in self.parts], dim=-1)


def make_linear(
    parts: list[StoredLinear], dtype: torch.dtype, int4_inputs: Int4Inputs = "16bit"
) -> Linear:
    """One layer over the stacked rows of `parts`, on the device that their tensors are on.

    dtype: what the decoder computes in. int4_inputs: of INT4 weights with 16-bit activations, where they
    are multiplied natively on a CPU. Parts that are stored in different ways are multiplied one after the
    other.
    """
    first = parts[0]
    if any(not _alike(first, part) for part in parts[1:]):
        return StackedLinear([make_linear([part], dtype, int4_inputs) for part in parts])
    bias = _stack([p.bias for p in parts if p.bias is not None], dtype)
    if first.scheme is None:
        weight = _stack([p.weight for p in parts if isinstance(p.weight, Tensor)], dtype)
        assert weight is not None
        return DenseLinear(weight, bias, None)
    scheme = first.scheme
    quantized = _stack_quantized(
        [p.weight for p in parts if isinstance(p.weight, Quantized)], scheme
    )
    sides = _sides(quantized.codes)
    columns = sides[1]
    size = scheme.weights.group_size or columns
    path = linear_path(scheme, sides, dtype, machine_of(quantized.codes.device))
    if "int4" in path and quantized.scale.dtype != dtype:  # another tool's: float16, float32
        exact = torch.equal(quantized.scale.to(dtype).float(), quantized.scale.float())
        path = path if exact else "expanded"
    if path == "int8":
        return Int8Linear(quantized, bias, dtype)
    if path == "fp8":
        return Fp8Linear(quantized, bias, first.input_scale)
    if path == "8-bit native":
        eight = _native_8_bit(quantized, bias, scheme, first.input_scale, int4_inputs)
        how = _ROUNDED[eight.rounding] if eight.kind == native.INT8 else ""
        return NativeLinear(eight, f"{scheme.label}: native{how}")
    if path == "weight-only 8-bit":
        rows = quantized.scale.float().reshape(-1)
        return WeightOnlyLinear(skinny.Weight(quantized.codes, rows, bias, sides), scheme.label)
    if path == "weight-only int4":
        packed = skinny.pack_int4(quantized.codes)
        scale = quantized.scale.to(dtype).t().contiguous()  # [groups, out]
        return WeightOnlyLinear(skinny.Weight(packed, scale, bias, sides, size), scheme.label)
    if path == "int4 native":
        rounding = _int4_rounding(scheme, int4_inputs)
        label = f"{scheme.label}: native{_ROUNDED[rounding]}"
        return NativeLinear(native.pack_int4(quantized, bias, rounding), label)
    if path == "int4 torch":
        return Int4CpuLinear(quantized, size, bias)
    activations = scheme.activations
    dense = DenseLinear(dequantize(quantized, dtype), bias, activations, first.input_scale)
    dense.fast = False
    dense.path = f"{scheme.label} expanded to {str(dtype).removeprefix('torch.')}"
    return dense


def linear_path(
    scheme: Scheme, sides: tuple[int, int], dtype: torch.dtype, machine: Machine
) -> Path:
    """How a weight [out, in] of this scheme is multiplied on a machine, computing in `dtype`.

    `expanded`: the codes become numbers of `dtype` at load; the result is the checkpoint's, and the memory
    and the speed are not. Everything else multiplies what is stored.
    """
    rows, columns = sides
    grid, activations = scheme.weights, scheme.activations
    per_row = grid.granularity in ("channel", "tensor")
    on_gpu = machine.kind == "cuda"
    # cuBLASLt's products of 8-bit numbers want inner sides that 16 divides; outer ones are padded
    aligned = not on_gpu or columns % 16 == 0
    by_token = activations is not None and activations.granularity == "token"
    if grid.kind == "int" and grid.bits == 8 and per_row and by_token and aligned:
        return "int8"
    rowwise = per_row and activations is not None and activations.group_size is None
    if grid.kind == "float" and rowwise and machine.has_fp8 and aligned and dtype == torch.bfloat16:
        return "fp8"
    is_8_bit = grid.bits == 8 and per_row and dtype == torch.bfloat16
    rounded_by_step = activations is None or (rowwise and grid.kind == "float")
    if is_8_bit and rounded_by_step and machine.kind == "cpu" and columns % 32 == 0:
        return "expanded" if isinstance(load_library(), str) else "8-bit native"
    triton = machine.runs_triton and dtype == torch.bfloat16
    if is_8_bit and activations is None:
        readable = grid.kind == "int" or machine.has_fp8
        return "weight-only 8-bit" if triton and readable else "expanded"
    packable = grid.kind == "int" and grid.bits == 4 and grid.group_size in _INT4_GROUPS
    if not packable or dtype != torch.bfloat16:
        return "expanded"
    if machine.kind == "cpu":
        # the native step takes pairs of 32 columns, and groups that they fill
        fits = columns % 64 == 0 and (grid.group_size == 32 or (grid.group_size or 64) % 64 == 0)
        in_integers = by_token and activations is not None and activations.kind == "int"
        if fits and (activations is None or in_integers) and not isinstance(load_library(), str):
            return "int4 native"
    if activations is not None:
        return "expanded"
    if triton and grid.symmetric:
        return "weight-only int4"
    if machine.kind == "cpu" and rows % 16 == 0:
        return "int4 torch"
    return "expanded"


def _native_8_bit(
    quantized: Quantized, bias: Tensor | None, scheme: Scheme, input_scale: Tensor | None,
    int4_inputs: Int4Inputs,
) -> NativeWeight:  # fmt: skip
    codes, scale = quantized.codes.contiguous(), quantized.scale.float().reshape(-1).contiguous()
    if codes.dtype == torch.int8:
        rounding = native.BY_BLOCK if int4_inputs == "int8" else native.AS_THEY_ARE
        return NativeWeight(codes, native.INT8, scale, bias=bias, rounding=rounding)
    kind = native.E4M3 if codes.dtype == torch.float8_e4m3fn else native.E5M2
    weight = NativeWeight(codes, kind, scale, bias=bias)
    if scheme.activations is None:
        return weight
    if input_scale is None:
        return weight._replace(rounding=native.BY_TOKEN)
    return weight._replace(rounding=native.STATIC, input_scale=float(input_scale))


def _int4_rounding(scheme: Scheme, int4_inputs: Int4Inputs) -> int:
    if scheme.activations is not None:
        return native.BY_TOKEN
    return native.BY_BLOCK if int4_inputs == "int8" else native.AS_THEY_ARE


_ROUNDED = {
    native.AS_THEY_ARE: "",
    native.BY_TOKEN: " in integers",
    native.BY_BLOCK: " in integers, inputs rounded to 8 bits in blocks of 32",
}


def encode_tokens(x: Tensor, takes: str) -> Quantized:
    """x [T, in] as the codes that `takes` names, one scale a token."""
    if uses_triton(x.device):
        return encode_rows(x, takes)
    return quantize_tokens_int8(x) if takes == "int8" else quantize_tokens_e4m3(x)


def round_activations(x: Tensor, grid: Grid, input_scale: Tensor | None = None) -> Tensor:
    """x [..., in] rounded to the grid of activations and back, in x's type.

    input_scale: [1], where the grid's scale is static; NVFP4: what its scales are divided by.
    """
    if grid.granularity == "tensor":
        assert input_scale is not None
        rounded = round_static(x, grid.kind, input_scale)
    elif grid.granularity == "token":
        tokens = quantize_tokens_int8(x) if grid.kind == "int" else quantize_tokens_e4m3(x)
        rounded = tokens.codes.float() * tokens.scale
    else:
        assert grid.group_size is not None
        if grid.bits == 8:
            rounded = round_groups_e4m3(x, grid.group_size)
        elif grid.scale_format == "e4m3":
            assert input_scale is not None
            rounded = round_groups_nvfp4(x, grid.group_size, input_scale)
        else:
            rounded = round_groups_mxfp4(x, grid.group_size)
    return rounded.to(x.dtype)


def static_scale(absmax: Tensor, grid: Grid) -> Tensor:
    """The input scale [1] for activations whose largest size is `absmax`, float32."""
    absmax = absmax.float().clamp(min=1e-12).reshape(1)
    if grid.scale_format == "e4m3":
        return invertible(E4M3_MAX * E2M1_MAX / absmax)
    return absmax / (E4M3_MAX if grid.kind == "float" else 127.5)


def calibrated_scale(scheme: Scheme, absmax: Tensor | None) -> Tensor | None:
    """The input scale [1] that a checkpoint of the scheme has, None where it has none. absmax: [in], what
    calibration saw of each channel."""
    if scheme.activations is None or not scheme.input_scale_name:
        return None
    assert absmax is not None
    return static_scale(absmax.max(), scheme.activations)


def _whole_rows(codes: Tensor) -> Tensor:
    """8-bit codes [out, in] with rows of zeros up to a multiple of 16 on a GPU: cuBLASLt wants that."""
    missing = -len(codes) % 16
    if not codes.is_cuda or not missing:
        return codes
    zeros = torch.zeros(missing, codes.shape[1], dtype=torch.uint8, device=codes.device)
    return torch.cat((codes.view(torch.uint8), zeros)).view(codes.dtype)


def _product_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times weight [out, in], summed and left in float32."""
    if x.is_cuda and x.dtype == weight.dtype and x.dtype != torch.float32:
        out = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        out = F.linear(x.float(), weight.float())
    return out if bias is None else out + bias.float()


def _alike(one: StoredLinear, other: StoredLinear) -> bool:
    """Whether two layers can be one matrix: stored and fed in the same way."""
    if one.scheme != other.scheme:
        return False
    if one.input_scale is None or other.input_scale is None:
        return one.input_scale is other.input_scale
    return torch.equal(one.input_scale, other.input_scale)


def _stack_quantized(parts: list[Quantized], scheme: Scheme) -> Quantized:
    """The rows of all parts. A scale of a whole tensor becomes one per row; scales over scales are
    divided out."""
    scales, zeros = [], []
    for part in parts:
        rows = part.codes.shape[0]
        scale = part.scale if part.global_scale is None else step_size(part)
        whole = scheme.weights.granularity == "tensor"
        scales.append(scale.expand(rows, -1) if whole else scale)
        if part.zero_point is not None:
            zeros.append(part.zero_point)
    codes = torch.cat([part.codes for part in parts])
    return Quantized(codes, torch.cat(scales), torch.cat(zeros) if zeros else None)


def _scale_and_zero(quantized: Quantized) -> Tensor:
    """torch's layout [groups, out, 2]: (code - 8) · scale + zero, codes counted from 0."""
    scale = quantized.scale.to(torch.bfloat16)
    zero = torch.zeros_like(scale)
    if quantized.zero_point is not None:
        zero = -quantized.zero_point.to(scale.dtype) * scale
    return torch.stack((scale.t(), zero.t()), dim=-1).contiguous()


def _stack(tensors: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    return torch.cat(tensors).to(dtype) if tensors else None


def _sides(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _has_skinny(device: torch.device) -> bool:
    """Whether the Triton kernels for few tokens run there."""
    return machine_of(device).runs_triton
