"""The wheel that users install: what it holds, and that it runs where no compiler is."""

import json
import os
import platform
import shutil
import subprocess
import sys
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


def _install_and_quantize(environment: Path, built: Path, model: Path) -> None:
    """Install a built file with pip where tinier is not, and run it there as a user does."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment],
        check=True,
        capture_output=True,
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # its dependencies are these; a path, so that the editable tinier among them is not found
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--no-deps",
         "--no-index", "--no-build-isolation", built],
        cwd=environment, check=True, capture_output=True,
    )  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = environment / "made"
    done = subprocess.run(
        [environment / "bin" / "tinier", "quantize", model, "--preset", "int8", "--out", out],
        cwd=environment, env=alone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "tinier.json").exists()
    found = subprocess.run(
        [environment / "bin" / "python", "-c", "import tinier; print(tinier.__file__)"],
        cwd=environment, env=alone, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith(str(packages))


def test_the_wheel_decodes_natively_without_a_compiler(
    tmp_path: Path, tiny: Callable[..., Checkpoint]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    sources = subprocess.run(
        [sys.executable, "-c", _SDIST, tmp_path], cwd=project, check=True, capture_output=True, text=True,
    ).stdout.split()[-1]  # fmt: skip
    # as pip does where there is no wheel for a machine
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path,
         tmp_path / sources],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("tinier-*-py3-none-linux_x86_64.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(installed)
    files = {
        p.relative_to(ROOT / "src") for p in (ROOT / "src" / "tinier").rglob("*") if p.is_file()
    }
    made = {path for path in files if "__pycache__" in path.parts}
    assert {path for path in files - made if not (installed / path).exists()} == set()
    assert {path.stem for path in installed.rglob("*.so")} == {
        f"cpu_decode-{x}" for x in LEVELS.values()
    }

    model, prompts = tiny(dtype=torch.bfloat16), [[1, 2, 3], [7]]
    for number, built in enumerate((wheel, tmp_path / sources)):
        _install_and_quantize(tmp_path / f"env-{number}", built, model.folder)
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
