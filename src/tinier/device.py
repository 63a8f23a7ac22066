"""The device to compute on, its peak memory and its speed."""

import gc
import os
import resource
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tinier.errors import InputError

_MODEL_SHARE = 0.4


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`; a GPU always has its number, and becomes the
    current one.

    `cuda` is this process's own under torchrun (LOCAL_RANK), else the current one. Raises InputError where
    there is none.
    """
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise InputError(f"device {device!r} is not known. Use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {device!r} was asked for and torch sees no GPU. Use --device cpu."
        )
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(number or os.environ.get("LOCAL_RANK") or torch.cuda.current_device())
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(
            f"there is no cuda:{index}: torch sees {count} GPU{'s' * (count > 1)}. Use cuda:0 to "
            f"cuda:{count - 1}; under torchrun one process for each, --nproc-per-node {count}."
        )
    # Triton launches on the current device, and NCCL takes it where nothing is said
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def free_memory_bytes(device: torch.device) -> int:
    """Free bytes of the GPU, or of the machine; in a container, of what it may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    return min([free, *_cgroup_free_bytes(Path("/"))])


def check_memory(needed_bytes: int, device: torch.device, what: str, advice: str) -> None:
    """Raise InputError where less than that is free. what: the work, such as `pruning llama`."""
    free = free_memory_bytes(device)
    if needed_bytes > free:
        raise InputError(
            f"{what} takes about {needed_bytes / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free. "
            f"{advice}"
        )


def _cgroup_free_bytes(root: Path) -> list[int]:
    """What the control groups of this process leave it, version 2 and 1: a group's limit less what it uses,
    and what of that is cached files, which give way. root: of the file system."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        if not group.is_dir():  # seen from inside a container, its own group is the top
            group = base
        # a group's limit holds for those inside it
        for one in (group, *group.parents):
            free = _group_free_bytes(one, *names)
            if free is not None:
                found.append(free)
            if one == base:
                break
    return found


def _group_free_bytes(group: Path, limit: str, usage: str, cached: str) -> int | None:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        stat = dict(
            line.split() for line in (group / "memory.stat").read_text("ascii").splitlines()
        )
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) >= 2**60:  # `max`, or version 1's word for it
        return None
    return max(0, int(most) - used + int(stat.get(cached, 0)))


class Staging:
    """Pinned room on the host for numbers that a GPU reads at every step. Two rooms take turns, and one is
    written again only when the device has read what it held."""

    def __init__(self) -> None:
        self._rooms: list[tuple[Tensor, torch.cuda.Event]] = []

    def room(self, size: int) -> Tensor:
        """[size] int32, with anything in it. `sent` follows before the next one is asked for."""
        packed, read = torch.empty(0, dtype=torch.int32), torch.cuda.Event()
        if len(self._rooms) == 2:
            packed, read = self._rooms.pop(0)
            read.synchronize()
        if packed.numel() < size:
            packed = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self._rooms.append((packed, read))
        return packed[:size]

    def sent(self) -> None:
        """The copy of the last room has been asked for."""
        self._rooms[-1][1].record()


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on `device`, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes in use so far: torch's allocations on a GPU, resident memory of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # not ru_maxrss, which on Linux starts at the peak of the process that started this one
        line = next(x for x in status.read_text(encoding="ascii").splitlines() if "VmHWM" in x)
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak, where the system lets a process do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or a sandbox
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def release_memory() -> None:
    """Give back what nothing refers to any more, models in reference cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def model_flops(device: torch.device) -> float:
    """FLOP/s that whole models reach in training and evaluation, for time estimates.

    About the share of `matmul_flops` that distillation of SmolLM2 reached on two cores.
    """
    return _MODEL_SHARE * matmul_flops(device)


@cache
def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product, timed at the first call, in a few tenths of a second."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best = float("inf")
    with bf16_products(device):
        for _ in range(4):  # the first one warms up
            _wait(device)
            started = time.perf_counter()
            torch.matmul(a, a)
            _wait(device)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def bf16_products(device: torch.device) -> AbstractContextManager[object]:
    """Makes products of bf16 matrices fast inside: on a CPU without bf16 instructions torch multiplies them
    in a scalar loop, more than ten times slower than in float32."""
    return nullcontext() if fast_bf16(device) else _Float32Products()


def fast_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bf16 matrices faster than float32 there."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Float32Products(TorchFunctionMode):
    """bf16 products in float32, rounded to bf16 afterwards, which is what bf16 hardware does."""

    _PRODUCTS = frozenset({
        F.linear, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    })  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        return func(*map(_widen, args), **{k: _widen(v) for k, v in kwargs.items()}).bfloat16()


def _widen(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if wide else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
