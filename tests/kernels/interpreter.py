"""Triton's interpreter, rounding as a GPU does.

By itself it cuts bits off where a number of fewer bits is made, so that nothing but sizes of errors could
be compared. torch's own conversions round to the nearest, as the hardware does.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

_TYPES = {
    tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
    tl.float64: torch.float64, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _convert(values: NDArray[Any], source: Any, target: Any, _: Any) -> NDArray[Any]:
    """Bits of floating-point numbers of one type to bits of another's."""
    given, made = _TYPES[source], _TYPES[target]
    raw = np.ascontiguousarray(values)
    shape = raw.shape
    bits = torch.from_numpy(raw.reshape(-1).view(f"i{given.itemsize}").copy())
    if given.itemsize == 1:
        bits = bits.view(torch.uint8)
    found = bits.view(given).to(made).view(_BITS[made.itemsize]).numpy()
    return found.view(f"u{made.itemsize}").reshape(shape)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """A product of matrices, summed in the result's type; by itself it takes bf16's bits for integers."""

    def values(handle: Any) -> NDArray[Any]:
        kind = handle.dtype.scalar
        if kind not in (tl.bfloat16, tl.float8e4nv, tl.float8e5):
            return np.asarray(handle.data)
        return _convert(handle.data, kind, tl.float32, None).view(np.float32)

    with np.errstate(invalid="ignore"):  # of rows that nobody reads
        product = np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


_original_cast = interpreter.InterpreterBuilder.cast_impl


def _cast(self: Any, source: Any, target: Any) -> Any:
    """Integers to bf16 and back, by way of float32; the interpreter keeps the integer as bf16's bits."""
    one, other = source.dtype.scalar, target.scalar
    if other == tl.bfloat16 and one.is_int():
        wide = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return _original_cast(self, wide, target)
    if one == tl.bfloat16 and other.is_int():
        return _original_cast(self, _original_cast(self, source, tl.float32), target)
    return _original_cast(self, source, target)


def round_as_a_gpu_does() -> None:
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
