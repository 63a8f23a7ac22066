"""What memory is free, also in a container."""

from pathlib import Path

import pytest
import torch

from tinier.device import Staging, _cgroup_free_bytes


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    write(folder / names[0], f"{limit}\n")
    write(folder / names[1], f"{used}\n")
    write(folder / "memory.stat", f"anon 5\n{names[2]} {cached}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_the_limits_of_a_group_and_of_those_around_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    top = tmp_path / "sys/fs/cgroup"
    group(top / "a", V2, "1000", 700, 100)
    group(top / "a/b", V2, "max", 300, 0)
    assert _cgroup_free_bytes(tmp_path) == [400]
    group(top / "a/b", V2, "350", 300, 0)
    assert _cgroup_free_bytes(tmp_path) == [50, 400]


def test_inside_a_container_the_own_group_is_the_top(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/docker-1\n")
    group(tmp_path / "sys/fs/cgroup", V2, "1000", 700, 0)
    assert _cgroup_free_bytes(tmp_path) == [300]


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n")
    group(tmp_path / "sys/fs/cgroup/memory/docker/1", V1, "2000", 500, 200)
    assert _cgroup_free_bytes(tmp_path) == [1700]


def test_no_groups(tmp_path: Path) -> None:
    assert _cgroup_free_bytes(tmp_path) == []


def test_two_rooms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    empty = torch.empty
    event = type(
        "Event", (), {"synchronize": lambda self: waited.append(self), "record": lambda self: None}
    )
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, pin_memory=False: empty(size, dtype=dtype)
    )
    staging = Staging()
    places = []
    for size in (1, 2, 8, 8, 8, 8, 3):
        room = staging.room(size)
        assert room.shape == (size,)
        staging.sent()
        places.append(room.data_ptr())
    assert places[2] == places[4] == places[6] != places[3] == places[5]
    assert len(waited) == 5
