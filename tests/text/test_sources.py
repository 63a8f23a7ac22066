import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tinier.errors import NetworkError, TextError
from tinier.text import load_documents, load_part, load_parts
from tinier.text.sources import _paragraphs, _squeeze


def test_the_built_in_sample_has_three_parts_without_a_common_paragraph() -> None:
    parts = load_parts("builtin")
    heldout, calibration, training = (
        {_squeeze(p) for d in documents for p in _paragraphs(d)}
        for documents in (parts.heldout, parts.calibration, parts.training)
    )
    assert not heldout & training
    assert not calibration & (heldout | training)
    sizes = [sum(map(len, part)) for part in (parts.heldout, parts.calibration, parts.training)]
    assert min(sizes) > 35_000
    assert sizes[2] == max(sizes)
    assert load_parts("builtin").sha256 == parts.sha256


def test_a_file_is_one_document_and_splits_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {i} " * 10 for i in range(100)))
    assert len(load_documents(str(path))) == 1
    parts = load_parts(str(path))
    assert len(parts.heldout) + len(parts.calibration) + len(parts.training) == 100
    assert load_part(str(path), "heldout") == load_documents(str(path))


def test_formats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "id": 1}\n')
    table = pyarrow.table({"text": ["four", "", None, "five"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "ignored.csv").write_text("six")
    assert load_documents(str(tmp_path)) == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"bad\.jsonl:2 is not an object"),
        ("bad.jsonl", "{", r"bad\.jsonl:1 is not an object"),
        ("bad.parquet", "text", "is not a parquet file"),
        ("bad.csv", "a,b", r"is of type '\.csv'\. Use \.txt"),
        ("empty.txt", "  \n", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TextError, match=message):
        load_documents(str(path))


def test_parquet_without_a_text_column(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(TextError, match='no column "text"; its columns: body'):
        load_documents(str(path))


def test_binary_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="not UTF-8"):
        load_documents(str(path))


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is no file and no folder"):
        load_documents(str(tmp_path / "nothing"))
    with pytest.raises(TextError, match=r"holds no file of \.txt"):
        load_documents(str(tmp_path))
    with pytest.raises(TextError, match="text source '' is no file and no folder"):
        load_documents("")
    with pytest.raises(TextError, match="'hub:' names no data set"):
        load_documents("hub:")


def test_a_hub_dataset_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="cannot be downloaded"):
        load_documents("hub:owner/name:config:train")


def hub_folder(
    tmp_path: Path, rows: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> str:
    """A data set that `datasets` itself reads, without network: a folder with a file of rows."""
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = (json.dumps(row) for row in rows)
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"hub:{folder}"


def test_a_data_set_is_read_as_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["" if i % 5 == 4 else f"Row {i}.\n" for i in range(2500)]
    source = hub_folder(tmp_path, [{"text": text} for text in [*texts, None]], monkeypatch)
    documents = load_documents(source)
    assert len(documents) == 2501
    assert documents[3] == "Row 3.\n"
    assert documents[1000:1002] == ["Row 1000.\n", "Row 1001.\n"]
    assert list(documents) == [text for text in texts if text]

    import datasets

    reads: list[int] = []
    whole = datasets.Dataset.iter

    def counted(self: object, batch_size: int) -> Iterator[dict[str, list[str]]]:
        for batch in whole(self, batch_size):
            reads.append(len(batch["text"]))
            yield batch

    monkeypatch.setattr(datasets.Dataset, "iter", counted)
    assert next(iter(load_documents(source))) == "Row 0.\n"
    assert reads == [1000]
    # its parts share no paragraph and lose none
    parts = load_parts(source)
    shared = [*parts.calibration, *parts.training, *parts.heldout]
    assert sorted(text.strip() for text in shared) == sorted(t.strip() for t in texts if t)


@pytest.mark.parametrize(
    ("row", "message"), [({"body": "x"}, 'no column "text"; columns: body'), ({"text": 5}, "int64")]
)
def test_a_data_set_without_texts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, object], message: str
) -> None:
    with pytest.raises(TextError, match=message):
        load_documents(hub_folder(tmp_path, [row], monkeypatch))


def test_a_hub_dataset_without_the_package_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        load_documents("hub:owner/name")


def test_json_lines_keep_unicode(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "Größe – 漢字"}), encoding="utf-8")
    assert load_documents(str(path)) == ["Größe – 漢字"]
