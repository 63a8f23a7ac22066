"""The native step built for other processors computes the same numbers: x86-64 of each level, and ARM under
qemu-user. What this machine cannot run is compiled alone."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinier.kernels import native

ROOT = Path(__file__).parent.parent.parent
X86 = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "alderlake", "sapphirerapids")
ARM_COMPILER, ARM_RUNNER = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM = ("armv8-a", "armv8.2-a+dotprod", "armv8.6-a+i8mm+bf16")
FLAGS = [flag for flag in native._FLAGS if not flag.startswith(("-march", "-shared"))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def build(compiler: str, march: str, folder: Path) -> Path:
    program = folder / march
    subprocess.run(
        [compiler, *FLAGS, f"-march={march}", "-static", f"-I{ROOT / 'src/tinier/kernels'}",
         str(ROOT / "tests/kernels/cpu_builds.cpp"), "-o", str(program)],
        check=True, capture_output=True,
    )  # fmt: skip
    return program


def printed(*command: str) -> list[tuple[str, Tensor]]:
    """Names and numbers of each line; empty where the processor lacks an instruction."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -4:  # SIGILL
        return []
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        name, _, values = line.partition(":")
        found.append((name, torch.tensor([float(value) for value in values.split()])))
    return found


@cache
def baseline(folder: Path) -> list[tuple[str, Tensor]]:
    return printed(str(build("g++", "x86-64-v3", folder)))


def check(ours: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        # a product's last bit: two at once, or without fused products; it may round a logit elsewhere
        limit = 1e-6 if name.startswith("product") else 0.01
        assert (one - other).norm() <= limit * other.norm(), name
        assert other.norm() > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builds")


@pytest.mark.parametrize("march", X86)
def test_a_build_for_x86(march: str, folder: Path) -> None:
    program = build("g++", march, folder)
    found, expected = printed(str(program)), baseline(folder)
    if not found or not expected:
        pytest.skip(f"it compiles; this machine does not run {march}")
    check(found, expected)


@pytest.mark.skipif(
    None in (shutil.which(ARM_COMPILER), shutil.which(ARM_RUNNER)),
    reason=f"no {ARM_COMPILER} or no {ARM_RUNNER}",
)
@pytest.mark.parametrize("march", ARM)
def test_a_build_for_arm(march: str, folder: Path) -> None:
    program = build(ARM_COMPILER, march, folder)
    expected = baseline(folder)
    found = printed(ARM_RUNNER, "-cpu", "max", str(program))
    if not expected:
        pytest.skip("this machine does not run x86-64-v3")
    check(found, expected)
