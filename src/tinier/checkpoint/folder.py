"""Open a model folder and check it before any weight is loaded.

Start at `open_checkpoint`. It reads `config.json`, the safetensors headers and `tinier.json`, and
finds what is missing, truncated or forbidden. Only safetensors are read, never pickle, and a model
that needs its own Python code is refused.
"""

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
_WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# the smallest byte, its sign aside, that is no number
_NOT_A_NUMBER = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
         "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    file: str
    """Name of the safetensors file that holds it."""
    stored: str
    """Its name there."""
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
    notes: tuple[str, ...] = ()
    """What its files do other than config.json says, each a sentence; stages keep them as warnings."""

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
    def typed_bytes(self) -> int:
        """Bytes of all tensors in the types that `reader` gives them."""
        item = self.dtype.itemsize
        return sum(
            math.prod(info.shape) * item if _is_weight(name, info) else info.num_bytes
            for name, info in self.tensors.items()
        )

    @property
    def dtype(self) -> torch.dtype:
        """The 16- or 32-bit type that the model computes in: the configuration's, or where it names
        none the one that most of the weights have."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or self._stored_dtype
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise CheckpointError(
                f"dtype {name!r} in {self.folder / 'config.json'} is not a type tinier computes "
                "in. Use bfloat16, float16 or float32."
            )
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def _stored_dtype(self) -> str:
        count: Counter[str] = Counter()
        for name, info in self.tensors.items():
            if _is_weight(name, info):
                count[info.dtype] += info.num_bytes
        return _WEIGHT_DTYPES[count.most_common(1)[0][0]] if count else "bfloat16"

    @contextmanager
    def reader(self, device: str | torch.device = "cpu") -> Iterator[TensorReader]:
        """Open the shards; yields read(name) -> tensor on `device`. Reads lazily, shard by shard.

        Weights come in the model's type, whatever they are stored in; codes and scales as they are.
        `read` raises CheckpointError for numbers that are none (NaN, Inf).
        """
        shards: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            info = self.tensors[name]
            if info.file not in shards:
                path = self.folder / info.file
                shards[info.file] = safe_open(path, framework="pt", device=str(device))
            tensor: Tensor = shards[info.file].get_tensor(info.stored)
            if _is_weight(name, info):
                tensor = tensor.to(self.dtype)
            self._check_numbers(name, tensor)
            return tensor

        yield read

    def optional(self, read: TensorReader) -> Callable[[str], Tensor | None]:
        """`read`, which gives None for a tensor that is not there."""
        return lambda name: read(name) if name in self.tensors else None

    def _check_numbers(self, name: str, tensor: Tensor) -> None:
        """Raise CheckpointError for NaN and Inf among the numbers of a tensor."""
        if tensor.dtype in _NOT_A_NUMBER:  # torch looks into no 8-bit float
            bad = (tensor.view(torch.uint8) & 0x7F) >= _NOT_A_NUMBER[tensor.dtype]
            if not bad.any():
                return
        elif tensor.is_floating_point():
            # a sum is one pass; one that overflows says nothing yet
            if math.isfinite(tensor.sum(dtype=torch.float32).item()):
                return
            bad = ~torch.isfinite(tensor)
            if not bad.any():
                return
        else:
            return
        first = bad.nonzero()[0].tolist()
        info = self.tensors[name]
        cast = ""
        if _is_weight(name, info) and _WEIGHT_DTYPES[info.dtype] != str(tensor.dtype)[6:]:
            cast = f", read as {str(tensor.dtype)[6:]}"
        raise CheckpointError(
            f"{name} in {self.folder / info.file} ({info.dtype}{cast}) holds {int(bad.sum())} values that "
            f"are no numbers (NaN or Inf), the first at {first}. Every result would be wrong. Download "
            "the model again, or convert it again from its source."
        )

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
        raise CheckpointError(
            f"model folder {folder} is empty. Download the model again, or give another folder."
        )
    config = _read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in _shards(folder).items():
        found = read_header(folder / shard)
        if expected is None:
            tensors.update(found)
            continue
        absent = sorted(set(expected) - set(found))
        if absent:
            raise CheckpointError(
                f"{folder / _INDEX_NAME} places {absent[0]} in {shard}, which does not hold it. "
                "Download the model again."
            )
        # a shard may hold more, an older version of what is elsewhere now: the index decides
        tensors.update({name: found[name] for name in expected})
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
    found = {path for pattern in _CONTENT_PATTERNS for path in folder.glob(pattern)}
    files = sorted(path for path in found if path.name != MANIFEST_NAME)
    with ThreadPoolExecutor() as pool:
        for path, one in zip(files, pool.map(file_sha256, files), strict=True):
            digest.update(f"{path.name}\0{one}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download it again.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Make it readable."
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}, not an object. Download it again."
        )
    return values


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        inside = sorted(folder.glob("*.gguf"))
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder. "
            + (
                f"Give its GGUF file: {inside[0]}"
                if inside
                else "Give the folder that holds config.json and *.safetensors."
            )
        )
    config = read_json(path)
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder} needs Python code of its own (auto_map in config.json). tinier never runs "
            "code from a model folder. Use a model of a family that transformers carries."
        )
    return config


def _is_weight(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a weight or bias of 16 bits or more, and not codes or scales."""
    return name.endswith((".weight", ".bias")) and info.dtype in _WEIGHT_DTYPES


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Shard file names, each with the tensors that the index takes from it; None: all, without an
    index."""
    index_path = folder / _INDEX_NAME
    if index_path.exists():
        try:
            weight_map = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{index_path} is not a safetensors index ({error!r}). Download it again."
            ) from None
        shards: dict[str, list[str]] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{index_path} names a shard outside the folder: {shard}. Download it again."
                )
            shards.setdefault(shard, []).append(tensor)
        if (folder / _SINGLE_NAME).exists() and _SINGLE_NAME not in shards:
            raise CheckpointError(
                f"{folder} holds two sets of weights: {_SINGLE_NAME}, which transformers would read, and "
                f"the shards of {_INDEX_NAME}, which others read. Remove the set that is not meant."
            )
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:4])}. "
                "Download the model again."
            )
        return dict(shards)
    if (folder / _SINGLE_NAME).exists():
        return {_SINGLE_NAME: None}
    if any(path for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds pickle weights only (.bin, .pt), which can run code when read; tinier "
            "never opens them. Convert it once where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(
        f"{folder} has no {_SINGLE_NAME} and no {_INDEX_NAME}. Give the folder that holds the weights."
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The names, types and shapes in a safetensors file, checked against its length.

    Format: 8 bytes little-endian header length, JSON header, then the data; offsets count from
    the start of the data.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{path} is truncated: {size} bytes hold no safetensors header. Download it again."
            )
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
                stored=name,
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
        raise CheckpointError(
            f"{path} is corrupt: its header cannot be read. Download it again."
        ) from None
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
                f"{list(info.shape)} of {info.dtype}. Download it again."
            )
    return tensors
