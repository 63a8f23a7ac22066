"""Read a text source as documents, and split it into calibration, training and held-out parts.

A source is `builtin`, a file (.txt, .md, .jsonl, .parquet), a folder of such files, or
`hub:NAME[:CONFIG[:SPLIT]]`. The built-in sample is `pydoc_data.topics`, the language reference that
every CPython carries (about 110,000 tokens of technical English; its text differs a little between
Python versions, so its hash goes into the results).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from tinier.errors import NetworkError, TextError

BUILTIN = "builtin"
_HUB_PREFIX = "hub:"
Document = str | list[dict[str, str]]
"""A text, or a conversation: messages with `role` and `content`."""
Text = str | Path | Sequence[Document]
"""Where text comes from (a file, a folder, `hub:NAME[:CONFIG[:SPLIT]]` or `builtin`), or its documents"""
Part = Literal["calibration", "training", "heldout"]
_TEXT_SUFFIXES = (".txt", ".md")
_SUFFIXES = (*_TEXT_SUFFIXES, ".jsonl", ".parquet")
_MIN_DOCUMENTS = 20
# shares of the text, by characters; held-out first, so that it gets the first long topic
_SHARES = {"heldout": 0.25, "calibration": 0.15, "training": 0.60}


@dataclass(frozen=True, slots=True)
class TextParts:
    """Three parts of a text that share no paragraph."""

    calibration: Sequence[str]
    training: Sequence[str]
    heldout: Sequence[str]
    sha256: dict[str, str]
    """Hash of each part."""


def load_parts(source: str) -> TextParts:
    """Read a source and split it by document, always in the same way.

    A paragraph that stands in two parts (the language reference repeats sections under several
    topics) stays in the first of held-out, training and calibration, so that nothing measured was
    trained on.
    Raises TextError or NetworkError.
    """
    documents = list(load_documents(source))
    if len(documents) < _MIN_DOCUMENTS:
        text = "\n\n".join(documents)
        documents = _paragraphs(text)
        if len(documents) < 2:  # a paragraph a line
            documents = [line for line in text.split("\n") if line.strip()]
    parts: dict[str, list[str]] = {name: [] for name in _SHARES}
    sizes = dict.fromkeys(_SHARES, 0)
    for document in documents:
        neediest = min(_SHARES, key=lambda name: sizes[name] / _SHARES[name])
        parts[neediest].append(document)
        sizes[neediest] += len(document)
    seen: set[str] = set()
    for name in ("heldout", "training", "calibration"):
        parts[name] = [kept for d in parts[name] if (kept := _without(d, seen))]
        seen |= {_squeeze(p) for document in parts[name] for p in _paragraphs(document)}
    return text_parts(**parts)


def load_calibration(source: str) -> list[Document]:
    """Text to calibrate on: what `load_part` gives, or conversations. Raises TextError."""
    path = Path(source).expanduser()
    if _holds_conversations(path):
        return load_conversations(path)
    return list(load_part(source, "calibration"))


def documents_of(text: Text, part: Part) -> Sequence[Document]:
    """The documents that are given, or those of a source, for one purpose. Raises TextError or
    NetworkError."""
    if not isinstance(text, str | Path):
        return text
    return load_calibration(str(text)) if part == "calibration" else load_part(str(text), part)


def load_part(source: str, part: Part) -> Sequence[str]:
    """One part of the built-in sample, or all of any other source: who names a file means all of it."""
    if source == BUILTIN:
        documents: list[str] = getattr(load_parts(source), part)
        return documents
    return load_documents(source)


def text_parts(
    calibration: Sequence[str], training: Sequence[str], heldout: Sequence[str]
) -> TextParts:
    """Parts with their hashes."""
    parts = {"calibration": calibration, "training": training, "heldout": heldout}
    return TextParts(**parts, sha256={name: _sha256(part) for name, part in parts.items()})


def load_documents(source: str) -> Sequence[str]:
    """The documents of a source, in order; a data set's are read when they are asked for.

    Raises TextError or NetworkError."""
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return list(topics.values())
    if source.startswith(_HUB_PREFIX):
        return _HubTexts(_from_hub(source))
    path = Path(source).expanduser()
    if source and path.is_dir():  # Path("") is the current folder
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        if not files:
            raise TextError(f"text folder {path} holds no file of {', '.join(_SUFFIXES)}.")
    elif path.is_file():
        files = [path]
    else:
        raise TextError(
            f"text source {source!r} is no file and no folder. Use a file of "
            f"{', '.join(_SUFFIXES)}, a folder, hub:NAME[:CONFIG[:SPLIT]] or builtin."
        )
    documents = [document for file in files for document in _read(file) if document.strip()]
    if not documents:
        raise TextError(f"text source {source!r} is empty. Give one that has text.")
    return documents


def _read(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if path.suffix == ".jsonl":
        for number, entry in _json_lines(path):
            document = entry.get("text") if isinstance(entry, dict) else None
            if not isinstance(document, str):
                raise TextError(
                    f'{path}:{number} is not an object with a string "text". Write each line as '
                    '{"text": "..."}.'
                )
            _check_unicode(path, number, document)
            yield document
    elif path.suffix in _TEXT_SUFFIXES:
        yield read_text(path)
    else:
        raise TextError(f"{path} is of type {path.suffix!r}. Use {', '.join(_SUFFIXES)}.")


def read_text(path: Path) -> str:
    """A text file, which is UTF-8; a byte-order mark is no part of it. Raises TextError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}. Make it readable.") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file that has one in each line, with their numbers; None for what is no JSON."""
    # not splitlines: a JSON string may hold U+2028 and other characters that it takes for line ends
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, None


def _check_unicode(path: Path, number: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(
            f"{path}:{number} has half a surrogate pair (such as \\ud83d alone), which is no Unicode. "
            "Remove it."
        ) from None


def load_conversations(path: Path) -> list[Document]:
    """The conversations of a .jsonl file, one object with `messages` a line. Raises TextError."""
    conversations: list[Document] = []
    for number, entry in _json_lines(path):
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise TextError(
                f'{path}:{number} is not an object with "messages", each with a string "role" and '
                '"content". Write each line like this, or leave it out.'
            )
        for message in messages:
            _check_unicode(path, number, message["role"] + message["content"])
        conversations.append(messages)
    return conversations


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(field), str) for field in ("role", "content")
    )


def _holds_conversations(path: Path) -> bool:
    """Whether the first line of a .jsonl file has messages."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    _, first = next(_json_lines(path), (0, None))
    return isinstance(first, dict) and "messages" in first


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TextError(f"reading {path} needs pyarrow. Type: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise TextError(f"{path} is not a parquet file: {error}. Give another file.") from None
    if "text" not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise TextError(f'{path} has no column "text"; its columns: {names}. Rename one.')
    kind = str(file.schema_arrow.field("text").type)
    if kind not in ("string", "large_string", "string_view"):
        raise TextError(f'{path} has a column "text" of {kind}. It must hold strings.')
    for batch in file.iter_batches(columns=["text"]):
        yield from (document for document in batch.column(0).to_pylist() if document)


class _HubTexts(Sequence[str]):
    """The column `text` of a data set, read from disk as it is asked for; blank rows are left out."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Rows, blank ones counted."""
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        text: str | list[str] = self._dataset[index]["text"]
        return text

    def __iter__(self) -> Iterator[str]:
        for batch in self._dataset.iter(batch_size=1000):
            yield from (document for document in batch["text"] if document and document.strip())


def _from_hub(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise TextError(f"{source} needs datasets. Type: pip install datasets") from None
    name, *rest = source.removeprefix(_HUB_PREFIX).split(":")
    if not name:
        raise TextError(
            f"text source {source!r} names no data set. Use hub:NAME[:CONFIG[:SPLIT]], such as "
            "hub:Salesforce/wikitext:wikitext-103-raw-v1."
        )
    config = rest[0] if rest else None
    split = rest[1] if len(rest) > 1 else "train"
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # its own errors have no common class
        raise NetworkError(
            f"{source} is not in the local cache and cannot be downloaded ({error}). "
            "Check the name, or use a local file or builtin."
        ) from None
    if "text" not in dataset.column_names:
        raise TextError(
            f'{source} has no column "text"; columns: {", ".join(dataset.column_names)}. '
            "Use another data set."
        )
    dtype = getattr(dataset.features["text"], "dtype", "a list")
    if dtype not in ("string", "large_string"):
        raise TextError(f'{source}: column "text" is {dtype}, not string. Use another data set.')
    return dataset


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _without(document: str, seen: set[str]) -> str:
    kept = [p for p in _paragraphs(document) if _squeeze(p) not in seen]
    return "\n\n".join(kept)


def _squeeze(paragraph: str) -> str:
    # the same paragraph is indented differently from topic to topic
    return " ".join(paragraph.split())


def _sha256(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for i, document in enumerate(documents):
        digest.update(("\0" * (i > 0) + document).encode())
    return digest.hexdigest()
