"""What a device can compute natively: the one place that looks at a GPU's compute capability.

Start at `machine_of`. What each format gets on each of them is written down in `linear.linear_path`, and
printed by docs/devices.md.
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

_TRITON = find_spec("triton")
# a folder of that name in the current directory is found too, and is no package
HAS_TRITON = _TRITON is not None and _TRITON.origin is not None


class Machine(NamedTuple):
    """A device, as far as the choice of kernels goes."""

    kind: Literal["cpu", "cuda"]
    capability: tuple[int, int] = (0, 0)
    """Compute capability of a GPU, such as (9, 0)"""
    has_triton: bool = HAS_TRITON

    @property
    def runs_triton(self) -> bool:
        """Whether our Triton kernels run: from Ampere on, whose tensor cores know bf16."""
        return self.kind == "cuda" and self.has_triton and self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether there are instructions for E4M3: from Ada on."""
        return self.kind == "cuda" and self.capability >= (8, 9)

    def caches(self, dtype: torch.dtype) -> bool:
        """Whether the attention kernels read and write a cache of this type."""
        return self.runs_triton and (dtype != torch.float8_e4m3fn or self.has_fp8)


def machine_of(device: torch.device) -> Machine:
    """The machine behind a torch device."""
    if device.type != "cuda":
        return Machine("cpu")
    return Machine("cuda", _capability(device.index))


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
