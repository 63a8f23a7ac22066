"""A checkpoint is there whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tinier.checkpoint import TensorWriter, atomic_folder, check_disk, check_output
from tinier.checkpoint import writer as writer_module
from tinier.errors import OutputError


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with atomic_folder(out, needed_bytes=10) as partial:
        (partial / "a").write_text("a")
        assert not out.exists()
    assert (out / "a").read_text() == "a"
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_folder(out, needed_bytes=10) as partial,
    ):
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists. Choose another --out"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="exists"), atomic_folder(tmp_path, needed_bytes=1):
        pass


def test_too_little_disk_is_found_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs about 1\d+ GB and its disk has"):
        check_disk(tmp_path / "a" / "b", 10**20)


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "save_file", full)
    with (
        pytest.raises(OutputError, match=r"filled up .* about 5 MB are needed"),
        atomic_folder(tmp_path / "model", needed_bytes=5_000_000) as partial,
    ):
        writer = TensorWriter(partial)
        writer.add("x", torch.zeros(4))
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("this machine does not allow mounts")
    try:
        with (
            pytest.raises(OutputError, match="filled up"),
            atomic_folder(disk / "model", needed_bytes=1000) as partial,
        ):
            writer = TensorWriter(partial)
            writer.add("x", torch.zeros(10**6))
            writer.close()
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_a_kill_leaves_is_removed_by_the_next_write(tmp_path: Path) -> None:
    out = tmp_path / "model"
    code = (
        "import sys, time; from pathlib import Path; from tinier.checkpoint import atomic_folder\n"
        f"with atomic_folder(Path({str(out)!r}), needed_bytes=1) as p:\n"
        "    (p / 'big').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(out, needed_bytes=1) as partial:
        (partial / "a").write_text("a")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".model.partial-{os.getppid()}"
    other.mkdir()
    with atomic_folder(tmp_path / "model", needed_bytes=1):
        time.sleep(0)
    assert other.exists()


def test_shards_have_an_index_and_the_right_names(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, shard_bytes=64)
    for i in range(5):
        writer.add(f"t{i}", torch.full((8,), float(i)))  # 32 bytes each
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    text = (tmp_path / "model.safetensors.index.json").read_text()
    assert '"t4": "model-00003-of-00003.safetensors"' in text
    assert '"total_size": 160' in text
