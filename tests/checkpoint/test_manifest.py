import shutil
from pathlib import Path

import pytest

import tinier
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


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tinier's source in a folder of its own, which digests are made of."""
    package = tmp_path / "tinier"
    shutil.copytree(
        Path(tinier.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr("tinier.__file__", str(package / "__init__.py"))
    return package


MADE_BY = {
    "quantize": "tinier.quantization.driver", "prune": "tinier.pruning.driver",
    "distill": "tinier.distillation.driver", "importance": "tinier.pruning.importance",
    "speed": "tinier.benchmark.speed", "quality": "tinier.evaluation.quality",
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "changes", "leaves"),
    [
        ("kernels/cpu_decode.cpp", {"speed", "quality", "distill", "quantize"}, set()),
        ("kernels/linear.py", {"quantize", "importance", "speed", "prune"}, set()),
        ("engine/sampler.py", {"speed", "quantize"}, set()),
        ("text/windows.py", {"importance", "quantize", "prune"}, set()),
        ("distillation/losses.py", {"distill"}, {"quantize", "prune", "speed", "quality"}),
        ("report/table.py", set(), set(MADE_BY)),
        ("serving/app.py", set(), set(MADE_BY)),
    ],
)
def test_a_digest_follows_what_a_module_imports(
    copied: Path, file: str, changes: set[str], leaves: set[str]
) -> None:
    def digests() -> dict[str, str]:
        code_digest.cache_clear()
        return {name: code_digest(module) for name, module in MADE_BY.items()}

    before = digests()
    with (copied / file).open("a") as stream:
        stream.write("\n")
    after = digests()
    assert {name for name in MADE_BY if before[name] != after[name]} >= changes
    assert {name for name in MADE_BY if before[name] == after[name]} >= leaves
    code_digest.cache_clear()
