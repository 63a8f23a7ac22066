"""What a measurement ran on: without it a number means nothing."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from tinier.checkpoint.manifest import package_versions


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, system and versions."""
    record: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "versions": package_versions(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return record


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of tinier's own source tree, `+` where it has changes; None outside a checkout."""
    here = Path(__file__).parent
    commit = _output(["git", "-C", str(here), "rev-parse", "--short", "HEAD"])
    if commit is None or _output(["git", "-C", str(here), "ls-files", __file__]) in (None, ""):
        return None
    return commit + ("+" if _output(["git", "-C", str(here), "status", "--porcelain", "."]) else "")


def _driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
