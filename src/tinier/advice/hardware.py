"""Devices that people serve on, by name: memory, bandwidth, and what they multiply.

Start at `device_named`. Figures are the makers' (dense, without sparsity), of the CPU a guess; they only
rank and estimate: what counts is measured by `tinier run` and `tinier fit` on the device itself.
"""

import difflib
from dataclasses import dataclass

import psutil
import torch

from tinier.device import free_memory_bytes
from tinier.errors import InputError


@dataclass(frozen=True)
class Hardware:
    name: str
    memory_gb: float
    """For the model; of a machine without a GPU, main memory"""
    bandwidth_gb_s: float
    bf16_tflops: float
    capability: tuple[int, int] | None
    """Compute capability of an NVIDIA GPU; None: a CPU"""

    @property
    def has_fp8(self) -> bool:
        return self.capability is not None and self.capability >= (8, 9)

    @property
    def has_fp4(self) -> bool:
        return self.capability is not None and self.capability >= (10, 0)

    @property
    def runs_triton(self) -> bool:
        return self.capability is not None and self.capability >= (8, 0)

    @property
    def is_cpu(self) -> bool:
        return self.capability is None

    @property
    def lacks(self) -> list[str]:
        """What it has no arithmetic for."""
        found = []
        if not self.has_fp8:
            found.append("FP8 (needs Ada or Hopper)")
        if not self.has_fp4:
            found.append("FP4 (needs Blackwell)")
        if self.capability is not None and not self.runs_triton:
            found.append("bf16 and INT4 products of ours (need Ampere)")
        return found


DEVICES: dict[str, Hardware] = {
    device.name.lower(): device
    for device in (
        Hardware("T4", 16, 320, 65, (7, 5)),
        Hardware("A10", 24, 600, 125, (8, 6)),
        Hardware("A100", 80, 2039, 312, (8, 0)),
        Hardware("L4", 24, 300, 121, (8, 9)),
        Hardware("L40S", 48, 864, 362, (8, 9)),
        Hardware("RTX 4090", 24, 1008, 165, (8, 9)),
        Hardware("H100", 80, 3350, 989, (9, 0)),
        Hardware("H200", 141, 4800, 989, (9, 0)),
        Hardware("B200", 180, 8000, 2250, (10, 0)),
        Hardware("Jetson Orin", 64, 205, 43, (8, 7)),
        Hardware("CPU", 16, 50, 1, None),
    )
}


def device_named(name: str) -> Hardware:
    """A device by its name, or `auto`: this machine. Raises InputError."""
    if name == "auto":
        return this_machine()
    key = name.lower().replace("-", " ").replace("_", " ")
    plain = {known.replace(" ", ""): device for known, device in DEVICES.items()}
    found = plain.get(key.replace(" ", ""))
    if found is None:
        near = difflib.get_close_matches(key, DEVICES, n=1)
        hint = f" Did you mean {DEVICES[near[0]].name!r}?" if near else ""
        known = ", ".join(device.name for device in DEVICES.values())
        raise InputError(f"hardware {name!r} is not known. Use auto, {known}.{hint}")
    return found


def this_machine() -> Hardware:
    """What torch sees here: the GPU, else the CPU with the memory that is free."""
    if not torch.cuda.is_available():
        free = free_memory_bytes(torch.device("cpu"))
        cpu = DEVICES["cpu"]
        return Hardware(
            f"CPU ({psutil.cpu_count()} cores)",
            free / 1e9,
            cpu.bandwidth_gb_s,
            cpu.bf16_tflops,
            None,
        )
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    for key, device in DEVICES.items():
        if key in properties.name.lower():
            return Hardware(properties.name, properties.total_memory / 1e9, device.bandwidth_gb_s,
                            device.bf16_tflops, capability)  # fmt: skip
    like = max(
        (d for d in DEVICES.values() if d.capability and d.capability <= capability),
        key=lambda d: d.capability or (0, 0), default=DEVICES["t4"],
    )  # fmt: skip
    return Hardware(properties.name, properties.total_memory / 1e9, like.bandwidth_gb_s,
                    like.bf16_tflops, capability)  # fmt: skip
