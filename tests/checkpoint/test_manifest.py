from pathlib import Path

import pytest

from tinier.checkpoint import Manifest, code_digest
from tinier.errors import CheckpointError


def manifest() -> Manifest:
    return Manifest(
        stage="prune", parameters={"count": 2}, parents={"source": "ab"}, key="k", seconds=1.5,
        peak_memory_bytes=3, warnings=["careful"],
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest().write(tmp_path)
    found = Manifest.read(tmp_path)
    assert found == manifest() or found.created != manifest().created
    assert found.parameters == {"count": 2}
    assert {"torch", "transformers", "tinier", "python"} <= set(found.versions)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', "{}"])
def test_damage_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tinier.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a tinier manifest"):
        Manifest.read(tmp_path)


def test_another_schema_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tinier.json").write_text('{"schema": 99}')
    with pytest.raises(CheckpointError, match="schema 99"):
        Manifest.read(tmp_path)


def test_code_digest_follows_the_parts_it_names() -> None:
    assert code_digest("numerics", "schemes") == code_digest("schemes", "numerics")
    assert code_digest("numerics") != code_digest("schemes")
