"""CUDA C++ compiled at first use by NVRTC, which torch brings along, and kept in tinier's cache folder.

Start at `load`. NVRTC and the driver are called by their C interfaces.
"""

import ctypes
import hashlib
from collections.abc import Mapping
from ctypes import Structure, byref, c_char_p, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tinier.checkpoint import cache_folder, new_file
from tinier.errors import TinierError

_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OPT_IN_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver, which is there where torch has a GPU."""
    return ctypes.CDLL("libcuda.so.1")


def check_driver(result: int) -> None:
    """Raises TinierError for what a call of the driver returned, unless it is 0."""
    if result:
        said = c_char_p()
        driver().cuGetErrorString(result, byref(said))
        raise TinierError(f"the CUDA driver says: {(said.value or b'?').decode()} ({result})")


class Kernel:
    """One kernel of a module that is loaded on a device."""

    def __init__(self, cubin: bytes, name: str, device: torch.device) -> None:
        self._device = device
        self._module, self._function = c_void_p(), c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_blas_handle()  # the device's context is there
            check_driver(driver().cuModuleLoadData(byref(self._module), cubin))
        check_driver(
            driver().cuModuleGetFunction(byref(self._function), self._module, name.encode())
        )
        self._memory = 0

    def launch(self, parameter: Structure, blocks: int, threads: int, memory: int) -> None:
        """On the device's current stream, all blocks at once (cooperatively). memory: bytes of a block that
        its threads share."""
        parameters = (c_void_p * 1)(ctypes.addressof(parameter))
        with torch.cuda.device(self._device):
            if memory > self._memory:
                check_driver(
                    driver().cuFuncSetAttribute(self._function, _DYNAMIC_SHARED_MEMORY, memory)
                )
                self._memory = memory
            stream = c_void_p(torch.cuda.current_stream().cuda_stream)
            check_driver(
                driver().cuLaunchCooperativeKernel(
                    self._function, blocks, 1, 1, threads, 1, 1, c_uint(memory), stream, parameters
                )
            )


def load(source: Path, sizes: Mapping[str, int], name: str, device: torch.device) -> Kernel:
    """The kernel `name` of a source, compiled for a device with macros of these values, or as it was kept.
    Raises TinierError."""
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "-default-device"]
    options += [f"-D{key}={value}" for key, value in sizes.items()]
    text = source.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join((text, *options, str(torch.version.cuda))).encode())
    path = cache_folder() / "kernels" / f"{source.stem}-{key.hexdigest()[:16]}.cubin"
    if not path.exists():
        with new_file(path) as partial:
            partial.write_bytes(_compile(text, source.name, options))
    return Kernel(path.read_bytes(), name, device)


def most_shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    found = ctypes.c_int()
    index = device.index if device.index is not None else torch.cuda.current_device()
    check_driver(driver().cuDeviceGetAttribute(byref(found), _OPT_IN_SHARED_MEMORY, index))
    return found.value


def tensor_map(tensor: Tensor, size: int, sides: tuple[int, int], box: tuple[int, int]) -> bytes:
    """A CUtensorMap, through which boxes of a tensor's memory are copied: of rows that lie one after the
    other. size: bytes of an element, 2 or 8. sides, box: elements in a row, and rows."""
    room = (ctypes.c_ubyte * 192)()
    at = -(-ctypes.addressof(room) // 64) * 64
    check_driver(
        driver().cuTensorMapEncodeTiled(
            c_void_p(at), {2: 1, 8: 4}[size], 2, c_void_p(tensor.data_ptr()), (c_uint64 * 2)(*sides),
            (c_uint64 * 1)(sides[0] * size), (c_uint * 2)(*box), (c_uint * 2)(1, 1), 0, 0, 2, 0,
        )
    )  # fmt: skip
    return ctypes.string_at(at, 128)


def missing() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    try:
        _library()
    except OSError as error:
        return f"NVRTC is not found: {error}"
    return None


@cache
def _library() -> ctypes.CDLL:
    """NVRTC, of torch's own CUDA version."""
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        # beside torch, where pip puts it
        found = sorted(Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}"))
        if not found:
            raise
        return ctypes.CDLL(str(found[0]))


def _compile(text: str, name: str, options: list[str]) -> bytes:
    library, program, size = _library(), c_void_p(), c_size_t()

    def check(result: int) -> None:
        if not result:
            return
        library.nvrtcGetProgramLogSize(program, byref(size))
        said = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, said)
        raise TinierError(f"{name} does not compile: {said.value.decode()[:2000]}")

    check(library.nvrtcCreateProgram(byref(program), text.encode(), name.encode(), 0, None, None))
    try:
        chosen = (c_char_p * len(options))(*(option.encode() for option in options))
        check(library.nvrtcCompileProgram(program, len(options), chosen))
        check(library.nvrtcGetCUBINSize(program, byref(size)))
        made = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, made))
        return made.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))
