"""Checkpoints for other engines: written as each really reads them, and checked after that.

Start at `export` (driver.py). `TARGETS` (targets.py) says for each engine what it reads and why it
refuses the rest, `gguf_model.py` writes llama.cpp's file, `check.py` reads an export back and compares it
with its source.
"""

from tinier.exporting.driver import export, plan_export
from tinier.exporting.matrix import matrix, matrix_text
from tinier.exporting.planned import planned, suited
from tinier.exporting.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "Target",
    "export",
    "matrix",
    "matrix_text",
    "plan_export",
    "planned",
    "suited",
]
