"""Compiles cpu_decode.cpp on the machine that runs it, for that machine, and keeps the result in
tinier's cache folder; and the layout in which it reads INT4.
"""

import ctypes
import hashlib
import os
import subprocess
from ctypes import c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.checkpoint import cache_folder, new_file
from tinier.numerics import Quantized

_SOURCE = Path(__file__).with_name("cpu_decode.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")


class Int4Weight(NamedTuple):
    """INT4 codes as the native step reads them."""

    pairs: Tensor
    """[out, in/2] uint8: codes + 8, the even column in the low half"""
    scale: Tensor
    """[out, in/group] bf16"""
    zero: Tensor | None
    """(zero point + 8) / 8, as the scale; None on a symmetric grid"""


def pack_int4(quantized: Quantized) -> Int4Weight:
    """INT4 codes [out, in] for the native step."""
    unsigned = (quantized.codes + 8).to(torch.uint8)
    pairs = unsigned[:, 1::2] << 4 | unsigned[:, ::2]
    zero = quantized.zero_point
    if zero is not None:
        zero = ((zero.float() + 8) / 8).to(torch.bfloat16).contiguous()
    return Int4Weight(pairs, quantized.scale.to(torch.bfloat16).contiguous(), zero)


def expand_int4(weight: Int4Weight) -> Tensor:
    """The weight [out, in] in bf16."""
    library = load_library()
    assert not isinstance(library, str)
    rows, columns = weight.pairs.shape[0], 2 * weight.pairs.shape[1]
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    zero = None if weight.zero is None else weight.zero.data_ptr()
    library.expand_int4(
        weight.pairs.data_ptr(), weight.scale.data_ptr(), zero, rows, columns,
        columns // weight.scale.shape[1], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def expand_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight [out, in] in bf16. codes: E4M3 or E5M2, columns a multiple of 8. scale: [out] float32."""
    library = load_library()
    assert not isinstance(library, str)
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    library.expand_fp8(
        codes.data_ptr(), scale.data_ptr(), codes.dtype == torch.float8_e5m2, rows, columns,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def load_library() -> ctypes.CDLL | str:
    """The compiled step, or why there is none."""
    try:
        path = build(os.environ.get("CXX", "c++"))
        library = ctypes.CDLL(str(path))
    except FileNotFoundError as error:
        return f"there is no C++ compiler {error.filename!r}. Install g++, or name one in CXX."
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"cpu_decode.cpp does not compile here: {detail.strip().splitlines()[0]}"
    library.decode_step.argtypes = (c_void_p, c_void_p)
    library.decode_step.restype = None
    pointers, sizes = (c_void_p,) * 3, (c_int32,) * 3
    library.expand_int4.argtypes = (*pointers, *sizes, c_void_p, c_int32)
    library.expand_int4.restype = None
    library.expand_fp8.argtypes = (c_void_p, c_void_p, *sizes, c_void_p, c_int32)
    library.expand_fp8.restype = None
    return library


def build(compiler: str, folder: Path | None = None) -> Path:
    """Compile the source, unless that was done before. Returns the library's path.

    Its name holds everything that it depends on, and it appears under it all at once, so any number of
    processes may build and load it.
    """
    folder = folder or cache_folder() / "kernels"
    # says the compiler's version and what `native` is here
    machine = _output(compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull)
    parts = (_SOURCE.read_text(encoding="utf-8"), *_FLAGS, machine)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = folder / f"cpu_decode-{name}.so"
    if not path.exists():
        with new_file(path) as partial:
            _output(compiler, *_FLAGS, str(_SOURCE), "-o", str(partial))
    return path


def _output(*command: str) -> str:
    """What a command says. LC_ALL, so that it says the same to everyone."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    )
    return done.stdout + done.stderr
