"""The wheel that users install: what it holds, and that it runs where no compiler is."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.kernels.compiling import LEVELS

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or platform.machine() != "x86_64" or sys.platform != "linux",
        reason="libraries are built for Linux on x86-64, by g++",
    ),
]

_SDIST = """
import sys
from setuptools import build_meta

print(build_meta.build_sdist(sys.argv[1]))
"""
_ANSWER = """
import json, sys
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model
from tinier.kernels.native import load_library

engine = Engine(open_model(sys.argv[1]), EngineConfig(device="cpu", max_seq_len=64))
texts = engine.generate(json.loads(sys.argv[2]), SamplingParams(max_tokens=8))
print(json.dumps([str(load_library()), engine.runner._native is not None, texts]))
"""


def test_the_wheel_decodes_natively_without_a_compiler(
    tmp_path: Path, tiny: Callable[..., Checkpoint]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."],
        cwd=project, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("tinier-*-py3-none-linux_x86_64.whl")
    installed = tmp_path / "installed"
    sources = subprocess.run(
        [sys.executable, "-c", _SDIST, tmp_path], cwd=project, check=True, capture_output=True, text=True,
    ).stdout.split()[-1]  # fmt: skip
    with tarfile.open(tmp_path / sources) as packed_sources:
        found = {name.partition("/")[2] for name in packed_sources.getnames()}
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(installed)
    # what is in the wheel, its libraries left out, is in the sources too: it can be built from them
    files = {
        f"src/{p.relative_to(installed)}" for p in (installed / "tinier").rglob("*") if p.is_file()
    }
    assert {name for name in files if not name.endswith(".so")} <= found
    assert "src/tinier/recipe/demo.yaml" in found
    assert {path.stem for path in installed.rglob("*.so")} == {
        f"cpu_decode-{x}" for x in LEVELS.values()
    }

    model, prompts = tiny(dtype=torch.bfloat16), [[1, 2, 3], [7]]
    command = [sys.executable, "-c", _ANSWER, str(model.folder), json.dumps(prompts)]
    # nothing is found but Python: no compiler, and none that CXX names
    environment = os.environ | {"PYTHONPATH": str(installed), "CXX": "no-such-compiler"}
    for capability in {"default", "avx2", torch.backends.cpu.get_cpu_capability().lower()}:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=tmp_path,
            env=environment | {"ATEN_CPU_CAPABILITY": capability},
        )  # fmt: skip
        library, native, texts = json.loads(done.stdout.splitlines()[-1])
        assert f"cpu_decode-{LEVELS[capability.upper()]}.so" in library
        assert native
        engine = Engine(model, EngineConfig(device="cpu", max_seq_len=64))
        assert texts == engine.generate(prompts, SamplingParams(max_tokens=8))
