"""The wheel of Linux on x86-64 holds the CPU's native step, for machines without a compiler."""

import platform
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

COMPILING = runpy.run_path("src/tinier/kernels/compiling.py")
TAKES_LIBRARIES = sys.platform == "linux" and platform.machine() == "x86_64"


class Build(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode or not TAKES_LIBRARIES:
            return
        folder = Path(self.build_lib) / "tinier/kernels"
        try:
            for level in COMPILING["LEVELS"].values():
                COMPILING["compile_level"]("g++", level, folder)
        except FileNotFoundError:
            self.announce("no g++: machines without a compiler will run step by step", 3)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"cpu_decode.cpp does not compile:\n{error.stderr}") from error


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Of any Python, and of this system."""
        built = any((Path(self.bdist_dir) / "tinier/kernels").glob("*.so"))
        system = super().get_tag()[2] if not built else self.plat_name.replace("-", "_")
        return "py3", "none", system or "any"


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
