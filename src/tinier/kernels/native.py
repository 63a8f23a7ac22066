"""Compiles cpu_decode.cpp on the machine that runs it, for that machine, and keeps the result in
tinier's cache folder (or takes what the wheel holds); and the weights that it reads (`NativeWeight`).
"""

import ctypes
import hashlib
import logging
import os
import subprocess
from ctypes import Structure, byref, c_float, c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.checkpoint import cache_folder, new_file
from tinier.kernels.compiling import FLAGS, LEVELS, SOURCE, shipped_path
from tinier.numerics import Quantized, to_pairs

log = logging.getLogger(__name__)
_FLAGS = (*FLAGS, "-march=native", "-shared")


BF16, INT8, INT4, E4M3, E5M2 = range(5)
AS_THEY_ARE, BY_TOKEN, STATIC, BY_BLOCK = range(4)


class NativeWeight(NamedTuple):
    """A linear layer as cpu_decode.cpp reads it (struct Linear)."""

    weight: Tensor
    """[out, in] bf16, int8 or 8-bit floats; INT4: [out, in/2] uint8, codes + 8, the even column in the low
    half"""
    kind: int
    """BF16, INT8, INT4, E4M3 or E5M2"""
    scale: Tensor | None = None
    """[out] float32; INT4: [out, in/group] bf16"""
    zero: Tensor | None = None
    """INT4 on an asymmetric grid: (zero point + 8) / 8, as the scale"""
    sums: Tensor | None = None
    """INT8 whose inputs are rounded BY_TOKEN: of each row's codes, [out] int32"""
    bias: Tensor | None = None
    """[out] bf16"""
    rounding: int = AS_THEY_ARE
    """Of a layer of E4M3 its inputs to E4M3: none, BY_TOKEN, or STATIC. Of INT8 and INT4 to INT8: none,
    BY_TOKEN, or BY_BLOCK, of 32 inputs"""
    input_scale: float = 1.0
    """STATIC: theirs"""

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns * 2 if self.kind == INT4 else columns

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the struct."""
        return self.weight, self.scale, self.zero, self.sums, self.bias

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    def split(self, sizes: list[int]) -> list["NativeWeight"]:
        """Layers of so many rows."""
        parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in self.tensors]
        return [
            self._replace(weight=weight, scale=scale, zero=zero, sums=sums, bias=bias)
            for weight, scale, zero, sums, bias in zip(*parts, strict=True)
        ]

    def struct(self) -> "LinearStruct":
        """Points into the tensors, which must outlive it."""
        assert all(t is None or t.is_contiguous() for t in self.tensors)
        rows, columns = self.shape
        group = (
            columns // self.scale.shape[1] if self.scale is not None and self.kind == INT4 else 0
        )
        addresses = [None if t is None else t.data_ptr() for t in self.tensors]
        return LinearStruct(
            *addresses, rows, columns, self.kind, group, self.rounding, self.input_scale
        )

    def product(self, x: Tensor, *, exact: bool = False) -> Tensor:
        """x [T, in] in bf16 through the layer, [T, out], as a step computes it; exact: in float32, not
        rounded."""
        library = load_library()
        assert not isinstance(library, str)
        x = x.contiguous()
        dtype = torch.float32 if exact else torch.bfloat16
        out = torch.empty(x.shape[0], self.shape[0], dtype=dtype)
        library.multiply_rows(
            byref(self.struct()), x.data_ptr(), x.shape[0], out.data_ptr(), exact,
            torch.get_num_threads(),
        )  # fmt: skip
        return out


class LinearStruct(Structure):
    """struct Linear of cpu_decode.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "zero", "sums", "bias")),
        *((name, c_int32) for name in ("out", "in", "format", "group", "rounding")),
        ("input_scale", c_float),
    )


def pack_int4(quantized: Quantized, bias: Tensor | None, rounding: int) -> NativeWeight:
    """INT4 codes [out, in] for the native step."""
    pairs = to_pairs((quantized.codes + 8).to(torch.uint8))
    zero = quantized.zero_point
    if zero is not None:
        zero = ((zero.float() + 8) / 8).to(torch.bfloat16).contiguous()
    scale = quantized.scale.to(torch.bfloat16).contiguous()
    return NativeWeight(pairs, INT4, scale, zero, bias=bias, rounding=rounding)


@cache
def load_library() -> ctypes.CDLL | str:
    """The compiled step, or why there is none: for this very processor where there is a compiler, otherwise
    the one that the wheel holds for its level."""
    try:
        library = ctypes.CDLL(str(build(os.environ.get("CXX", "c++"))))
    except (OSError, subprocess.CalledProcessError) as error:
        shipped = _shipped()
        if shipped is None:
            return _reason(error)
        log.info("%s The library for %s is used, which is slower.", _reason(error), shipped._name)
        library = shipped
    library.decode_step.argtypes = (c_void_p, c_void_p)
    library.decode_step.restype = None
    library.multiply_rows.argtypes = (c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_int32)
    library.multiply_rows.restype = None
    return library


def _shipped() -> ctypes.CDLL | None:
    path = shipped_path(LEVELS[torch.backends.cpu.get_cpu_capability()])
    if not path.exists():
        return None
    # torch's OpenMP, whose threads it then shares
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    try:
        ctypes.CDLL(str(openmp[0]) if openmp else "libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("%s of the wheel does not load: %s", path.name, error)
        return None


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no C++ compiler {error.filename!r}. Install g++, or name one in CXX."
    detail = getattr(error, "stderr", None) or str(error)
    return f"cpu_decode.cpp does not compile here: {detail.strip().splitlines()[0]}"


def build(compiler: str, folder: Path | None = None) -> Path:
    """Compile the source, unless that was done before. Returns the library's path.

    Its name holds everything that it depends on, and it appears under it all at once, so any number of
    processes may build and load it.
    """
    folder = folder or cache_folder() / "kernels"
    # says the compiler's version and what `native` is here
    machine = _output(compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull)
    parts = (SOURCE.read_text(encoding="utf-8"), *_FLAGS, machine)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = folder / f"cpu_decode-{name}.so"
    if not path.exists():
        with new_file(path) as partial:
            _output(compiler, *_FLAGS, str(SOURCE), "-o", str(partial))
    return path


def _output(*command: str) -> str:
    """What a command says. LC_ALL, so that it says the same to everyone."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    )
    return done.stdout + done.stderr
