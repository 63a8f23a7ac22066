"""Write a checkpoint so that it is there whole or not at all.

`atomic_folder` gives a temporary sibling folder and renames it when the block ends well.
`TensorWriter` streams tensors into shards, so that a stage holds one shard in memory, not the model.
`resumable_folder` with `PartFiles` does both for stages that take long: a stage that was stopped
finds its finished parts again.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinier.checkpoint.folder import Checkpoint, read_header
from tinier.errors import OutputError

SHARD_BYTES = 2 * 2**30
_SIDE_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "vocab.*", "merges.txt", "chat_template*", "*.model", "tekken.json", "LICENSE*", "USE_POLICY*",
)  # fmt: skip
# what is written meanwhile has longer names
_LONGEST_NAME = 200
_SIDE_FOLDERS = ("additional_chat_templates",)


def check_output(out: Path) -> None:
    """Raise OutputError if `out` exists, for nothing is ever overwritten, or if it cannot be made."""
    try:
        exists = out.exists() or out.is_symlink()
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{out} is no name that a folder can have ({error}). Choose another --out."
        ) from None
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise OutputError(
            f"{out} has a name of over {_LONGEST_NAME} bytes. Choose a shorter --out."
        )
    if exists:
        raise OutputError(f"{out} exists. Choose another --out, or move it away first.")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Raise OutputError unless files can be made where `out` will be."""
    parent = _existing(out)
    if not parent.is_dir():
        raise OutputError(f"{out} cannot be made: {parent} is a file. Choose another --out.")
    try:  # whoever asks for permissions is told yes in /proc, or as root
        with tempfile.TemporaryDirectory(prefix=".tinier-", dir=parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {parent} takes no new files ({error.strerror}). Choose another "
            "--out."
        ) from None


def _existing(out: Path) -> Path:
    """`out`, or the nearest of its parents that is there."""
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())


def check_disk(out: Path, needed_bytes: int) -> None:
    """Raise OutputError unless the disk of `out` has room for `needed_bytes`."""
    parent = _existing(out)
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise OutputError(
            f"{out} needs about {_size(needed_bytes)} and its disk has {_size(free)} free. "
            "Free some, or choose an --out on another disk."
        )


@contextmanager
def atomic_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; rename it to `out` when the block ends without error.

    Anything else (an exception, Ctrl-C) removes it; what a kill leaves behind is removed the next
    time `out` is written. Raises OutputError where `out` exists or the disk is or gets full.
    """
    check_output(out)
    check_disk(out, needed_bytes)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        _share_permissions(partial)
        sync_folder(partial)
        partial.rename(out)
        _sync_path(out.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        advice = (
            " now that the partial result is removed. "
            "Free some, or choose an --out on another disk."
        )
        raise _explained(error, out, needed_bytes, advice) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def hold(out: Path, lock: Path) -> Iterator[None]:
    """Hold the lock file of `out` and remove it at the end; it goes with the process, however that ends.

    Raises OutputError where another process has it.
    """
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not _is_current(stream, lock)
        except BlockingIOError:
            taken = True
        if taken:
            raise OutputError(f"another tinier is working in {out}. Wait for it, or stop it.")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def wait_for(out: Path) -> Iterator[None]:
    """Be the only process that makes `out`, a folder of a shared cache; wait for another that does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.lock"
    while True:
        with lock.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_current(stream, lock):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_current(stream: IO[str], lock: Path) -> bool:
    """Whether the file that was locked is the one at the path: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), lock.stat())
    except FileNotFoundError:
        return False


@contextmanager
def resumable_folder(out: Path, key: str, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that outlives this process; rename it when the block ends.

    A block that ends in an exception, or a process that is killed, leaves the folder for the next
    call with the same `key` to go on; another key starts with an empty one. Files whose names start with a
    dot are removed once the folder is `out`. Raises OutputError where `out` exists, is being
    written by another process, or the disk is or gets full.
    """
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished_folder(out)
    lock = out.parent / f".{out.name}.lock"
    with hold(out, lock):
        key_file = partial / ".key"
        if not key_file.exists() or key_file.read_text(encoding="ascii") != key:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_atomically(key_file, key)
        # what a hidden folder holds is not of the output
        there = sum(
            path.stat().st_size for path in partial.rglob("*")
            if not path.relative_to(partial).parts[0].startswith(".")
        )  # fmt: skip
        check_disk(out, needed_bytes - there)
        try:
            yield partial
            _share_permissions(partial)
            sync_folder(partial)
            partial.rename(out)
            _sync_path(out.parent)
            # after the rename: without its key a killed run's work would not be found again
            for path in out.rglob(".*"):
                path.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            advice = ". Free some and type the same again: it goes on where it was."
            raise _explained(error, out, needed_bytes, advice) from error


def unfinished_folder(out: Path) -> Path:
    """Where `resumable_folder` keeps what is to become `out`."""
    return out.parent / f".{out.name}.unfinished"


class PartFiles:
    """The weights of a checkpoint in `count` files, each with a record, written one at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count

    def has(self, part: int) -> bool:
        """Whether the part is written, whole."""
        return self._path(part).exists()

    def write(self, part: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a part and its record; a kill leaves both or neither to be seen."""
        write_atomically(self._record(part), json.dumps(record))
        # clones, because safetensors refuses names that share memory
        host = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with new_file(self._path(part)) as partial:
            save_file(host, partial, metadata={"format": "pt"})

    def record(self, part: int) -> dict[str, Any]:
        """What was recorded with a part."""
        record: dict[str, Any] = json.loads(self._record(part).read_text(encoding="utf-8"))
        return record

    def read(self, part: int, device: torch.device) -> dict[str, Tensor]:
        """All tensors of a part."""
        with safe_open(self._path(part), framework="pt", device=str(device)) as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118

    def close(self) -> None:
        """Write the index over all parts."""
        weight_map: dict[str, str] = {}
        total = 0
        for part in range(self._count):
            found = read_header(self._path(part))
            weight_map.update({name: info.file for name, info in found.items()})
            total += sum(info.num_bytes for info in found.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=1) + "\n"
        write_atomically(self._folder / "model.safetensors.index.json", text)

    def _path(self, part: int) -> Path:
        return self._folder / f"model-{part + 1:05d}-of-{self._count:05d}.safetensors"

    def _record(self, part: int) -> Path:
        return self._folder / f".part-{part}.json"


class TensorWriter:
    """Stream tensors into `model*.safetensors` of at most `shard_bytes` each, plus an index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes

    def close(self) -> None:
        """Write what is pending, give the shards their final names and write the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard_path(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(i).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _shard_path(self, i: int) -> Path:
        return self._folder / f"shard-{i}.safetensors"

    def _flush(self) -> None:
        if self._pending:
            path = self._shard_path(len(self._shards))
            save_file(self._pending, path, metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending = {}
            self._pending_bytes = 0


def copy_side_files(source: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer, the generation defaults and the licence; never weights or manifests."""
    for path in {p for pattern in _SIDE_PATTERNS for p in source.folder.glob(pattern)}:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    for name in _SIDE_FOLDERS:
        if (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, folder / name)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader or a kill sees the old one or the new one."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write; when the block ends well it becomes `path` in one step, on the
    disk and not only in its cache. Any number of processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield partial
        _sync_path(partial)
        partial.replace(path)
        _sync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    """Remove temporary folders of `out` whose process is gone."""
    pattern = re.compile(re.escape(f".{out.name}.partial-") + r"(\d+)$")
    for path in out.parent.iterdir():
        match = pattern.match(path.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a leftover of an earlier process that had our number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _share_permissions(folder: Path) -> None:
    # safetensors writes files that only their owner can read; a server often runs as another user
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def sync_folder(folder: Path) -> None:
    """Bring a folder and its files from the system's cache to the disk."""
    # without it a power cut after the rename could leave a whole-looking folder of empty files
    for path in [*folder.rglob("*"), folder]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: Exception, out: Path, needed_bytes: int, advice: str) -> Exception:
    """The error as it is, or what a full disk means; `advice` goes on after the bytes that are free."""
    if not _is_disk_full(error):
        return error
    free = shutil.disk_usage(out.parent).free
    return OutputError(
        f"the disk filled up while writing {out}: about {_size(needed_bytes)} are needed and "
        f"{_size(free)} are free{advice}"
    )


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or "os error 28" in str(error)


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes //= 1000
    return f"{num_bytes} GB"
