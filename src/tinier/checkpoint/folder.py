"""Open a model folder and check it before any weight is loaded.

Start at `open_checkpoint`. It reads `config.json`, the safetensors headers and `tinier.json`, and
finds what is missing, truncated or forbidden. Only safetensors are read, never pickle, and a model
that needs its own Python code is refused.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from tinier.checkpoint.manifest import MANIFEST_NAME, Manifest
from tinier.errors import CheckpointError

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# what makes two checkpoints the same model: everything but our own note on how it was made
_CONTENT_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt")
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
         "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    file: str
    """Name of the safetensors file that holds it."""
    dtype: str
    """safetensors name, such as `BF16`."""
    shape: tuple[int, ...]
    num_bytes: int


class TensorReader(Protocol):
    """Reads tensors by name from the open shards of one checkpoint."""

    def __call__(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Checkpoint:
    """A verified model folder. Holds names and shapes, no weights."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    manifest: Manifest | None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content (weights, configuration, tokenizer); not of the manifest."""
        return content_hash(self.folder)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files that make the model: its shards, configuration and tokenizer."""
        shards = {info.file for info in self.tensors.values()}
        return sum(
            path.stat().st_size
            for path in {p for pattern in _CONTENT_PATTERNS for p in self.folder.glob(pattern)}
            if path.suffix != ".safetensors" or path.name in shards
        )

    @property
    def dtype(self) -> torch.dtype:
        """The 16- or 32-bit type that the model computes in, from the configuration."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise CheckpointError(
                f"dtype {name!r} in {self.folder / 'config.json'} is not a type tinier computes "
                "in. Use bfloat16, float16 or float32."
            )
        assert isinstance(dtype, torch.dtype)
        return dtype

    @contextmanager
    def reader(self, device: str | torch.device = "cpu") -> Iterator[TensorReader]:
        """Open the shards; yields read(name) -> tensor on `device`. Reads lazily, shard by shard."""
        shards: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            file = self.tensors[name].file
            if file not in shards:
                shards[file] = safe_open(self.folder / file, framework="pt", device=str(device))
            tensor: Tensor = shards[file].get_tensor(name)
            return tensor

        yield read

    def require(self, names: Iterable[str]) -> None:
        """Raise CheckpointError unless every named tensor is stored."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors that its config.json calls for: "
                f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}. "
                "Download or convert the model again."
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify the files of a model folder.

    Raises CheckpointError: no folder, no config.json, pickle weights only, remote code, a missing,
    truncated or corrupt shard.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"model folder {folder} does not exist. Give a folder with config.json and "
            "*.safetensors, a Hub id such as meta-llama/Llama-3.2-3B, a .gguf file, or smollm2-135m."
        )
    if not any(folder.iterdir()):
        raise CheckpointError(f"model folder {folder} is empty. Was the download interrupted?")
    config = _read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in _shards(folder).items():
        found = _read_header(folder / shard)
        absent = sorted(set(expected) - set(found))
        if absent:
            raise CheckpointError(
                f"{folder / _INDEX_NAME} places {absent[0]} in {shard}, which does not hold it. "
                "Download the model again."
            )
        tensors.update(found)
    manifest = Manifest.read(folder) if (folder / MANIFEST_NAME).exists() else None
    return Checkpoint(folder=folder, config=config, tensors=tensors, manifest=manifest)


def finished_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The checkpoint that a stage of this key wrote to `folder`; None where there is none, another's,
    or a damaged one."""
    if not folder.exists():
        return None
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return None
    return checkpoint if checkpoint.manifest and checkpoint.manifest.key == key else None


def content_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that make the model what it is."""
    digest = hashlib.sha256()
    files = {path for pattern in _CONTENT_PATTERNS for path in folder.glob(pattern)}
    for path in sorted(files):
        if path.name == MANIFEST_NAME:
            continue
        with path.open("rb") as stream:
            file_digest = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.name}\0{file_digest}\n".encode())
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder. "
            "Give the folder that holds config.json and *.safetensors."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object.")
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder} needs Python code of its own (auto_map in config.json). tinier never runs "
            "code from a model folder. Use a model of a family that transformers carries."
        )
    return config


def _shards(folder: Path) -> dict[str, list[str]]:
    """Shard file names, each with the tensor names that the index promises for it."""
    index_path = folder / _INDEX_NAME
    if index_path.exists():
        try:
            weight_map = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index_path} is not a safetensors index: {error!r}") from None
        shards: dict[str, list[str]] = {}
        for tensor, shard in weight_map.items():
            if Path(shard).name != shard:
                raise CheckpointError(f"{index_path} names a shard outside the folder: {shard}")
            shards.setdefault(shard, []).append(tensor)
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:4])}. "
                "Download the model again."
            )
        return shards
    if (folder / _SINGLE_NAME).exists():
        return {_SINGLE_NAME: []}
    if any(path for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds pickle weights only (.bin, .pt), which can run code when read; tinier "
            "never opens them. Convert it once where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has no {_SINGLE_NAME} and no {_INDEX_NAME}.")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The names, types and shapes in a safetensors file, checked against its length.

    Format: 8 bytes little-endian header length, JSON header, then the data; offsets count from
    the start of the data.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes hold no safetensors header.")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > size - 8:
            raise CheckpointError(
                f"{path} is truncated or corrupt: its header should take {header_bytes} bytes of "
                f"{size}. Download it again."
            )
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        tensors = {
            name: TensorInfo(
                file=path.name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max(
            (e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise CheckpointError(f"{path} is corrupt: its header cannot be read.") from None
    if 8 + header_bytes + end != size:
        raise CheckpointError(
            f"{path} is truncated or corrupt: its header describes {8 + header_bytes + end} bytes "
            f"and the file has {size}. Download it again."
        )
    for name, info in tensors.items():
        # a type that is not in the table is refused when the tensor's shape is checked or read
        if info.dtype in _BITS and math.prod(info.shape) * _BITS[info.dtype] != 8 * info.num_bytes:
            raise CheckpointError(
                f"{path} is corrupt: {name} has {info.num_bytes} bytes, which is not "
                f"{list(info.shape)} of {info.dtype}."
            )
    return tensors
