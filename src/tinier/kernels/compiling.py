"""How cpu_decode.cpp is compiled: at first start for the machine at hand (native.py), or beforehand into
a wheel, for machines without a compiler (setup.py). Nothing but the standard library is imported."""

import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_decode.cpp")
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fPIC", "-Wno-psabi")
LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3", "DEFAULT": "x86-64-v2"}
"""What a wheel has a library for, by what torch calls it"""


def shipped_path(level: str) -> Path:
    """Where a wheel keeps the library of one of LEVELS."""
    return SOURCE.with_name(f"cpu_decode-{level}.so")


def compile_level(compiler: str, level: str, folder: Path) -> Path:
    """Compile the library of one of LEVELS into a folder. It needs no C++ library where it runs, and takes
    OpenMP from torch, which is in the process. Raises OSError or CalledProcessError."""
    path = folder / shipped_path(level).name
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "part.o"
        commands = (
            (compiler, *FLAGS, f"-march={level}", "-c", str(SOURCE), "-o", str(part)),
            # without -fopenmp, so that no libgomp is asked for by name
            (
                compiler,
                "-shared",
                "-static-libstdc++",
                "-static-libgcc",
                str(part),
                "-o",
                str(path),
            ),
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
    return path
