"""`tinier.json`: which stage made a checkpoint, from what, with which parameters, at what cost."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tinier
from tinier.errors import CheckpointError

MANIFEST_NAME = "tinier.json"
_SCHEMA = 1
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
        text = json.dumps(asdict(self), indent=1)
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
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a tinier manifest: {error!r}") from None


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


def code_digest(*parts: str) -> str:
    """Version plus a hash of the source files of the named parts (folders or modules) of tinier.

    A stage that names the parts it is made of is made again when their code changes, and is not
    when something else does.
    """
    root = Path(tinier.__file__).parent
    digest = hashlib.sha256()
    for part in sorted(parts):
        path = root / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return f"{tinier.__version__}+{digest.hexdigest()[:12]}"
