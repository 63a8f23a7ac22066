"""`tinier.json`: which stage made a checkpoint, from what, with which parameters, at what cost."""

import ast
import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tinier
from tinier.errors import CheckpointError

MANIFEST_NAME = "tinier.json"
_SCHEMA = 1
_SOURCES = (".cpp", ".html")
_PACKAGES = ("transformers", "compressed-tensors", "safetensors", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    stage: str
    """`convert`, `quantize`, `prune` or `distill`."""
    parameters: dict[str, Any]
    """What the stage was asked to do, complete: the same parameters give the same checkpoint."""
    parents: dict[str, str]
    """Content hash of each checkpoint that went in: `source`, and `teacher` when distilling."""
    key: str
    """Hash of stage, parameters, parents and code: equal keys need no second run."""
    seconds: float
    peak_memory_bytes: int
    device: str = "cpu"
    layers: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Measurements by layer or module name, such as `snr_db` of a quantized weight; None: exact."""
    measures: dict[str, Any] = field(default_factory=dict)
    """Measurements of the whole stage, such as the loss before and after distillation."""
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = _SCHEMA

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        path = folder / MANIFEST_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["schema"] != _SCHEMA:
                raise CheckpointError(
                    f"{path} has schema {values['schema']}; this tinier reads schema {_SCHEMA}. "
                    "Make the checkpoint again, or install the tinier that made it."
                )
            known = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is not a tinier manifest ({error!r}). Remove it."
            ) from None


def package_versions() -> dict[str, str]:
    """Versions of Python, tinier and the packages that touch the numbers."""
    versions = {"python": platform.python_version(), "tinier": tinier.__version__}
    # torch's own word names its build (+cpu, +cu130), which the package's version may not
    versions["torch"] = str(torch.__version__)
    return versions | {name: version(name) for name in _PACKAGES}


def stage_key(stage: str, parameters: dict[str, Any], parents: dict[str, str], code: str) -> str:
    """One hash for everything that decides what a stage writes."""
    text = json.dumps([stage, parameters, parents, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest(*modules: str) -> str:
    """A hash of the source of some modules of tinier and of all that they import of it, however deep;
    files beside them that are no Python (kernels in C++) included.

    What a module's results depend on is what it imports: nobody has to keep a list, and what is made is
    made again when that changes and not when something else does.
    """
    digest = hashlib.sha256()
    root = Path(tinier.__file__).parent
    files = _imported_files(modules)
    beside = {path for file in files for path in file.parent.iterdir() if path.suffix in _SOURCES}
    for file in sorted(files | beside):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _imported_files(modules: Iterable[str]) -> set[Path]:
    """The files of modules of tinier and of those that they import, wherever in a file they do."""
    found: set[Path] = set()
    todo = list(modules)
    while todo:
        for path in _files_of(todo.pop()):
            if path not in found:
                found.add(path)
                todo += _imports(path)
    return found


def _files_of(module: str) -> list[Path]:
    """The file of a module and those of the packages that it lies in, tinier's own aside; none for what is
    no module of tinier."""
    root = Path(tinier.__file__).parent
    parts = module.split(".")[1:]
    packages = [root.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    own = [root.joinpath(*parts).with_suffix(".py")] if parts else []
    return [path for path in (*packages, *own) if path.is_file()]


@cache
def _imports(path: Path) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.startswith("tinier."))
