"""Documents to windows of exactly `length` tokens: nothing padded, nothing cut off mid-batch."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinier.errors import TextError
from tinier.text.sources import Document
from tinier.tokenizer import Tokenizer

# of a long text so many characters are tokenized for each token that is wanted, and more if needed
_CHARACTERS = 8
# tokens near the end of a text that was cut may be others than in the whole one
_UNCERTAIN = 64


def token_windows(
    tokenizer: Tokenizer, documents: Sequence[Document], *, length: int, count: int | None = None
) -> Tensor:
    """Pack documents end to end into windows of `length` tokens. Returns [windows, length] int64.

    Each window starts with the tokenizer's BOS if it has the habit of adding one, because that is
    what the model sees when it serves. A conversation is written with the model's chat template, whose
    own BOS is left out: there is one at the start of each window and no other.
    count: at most so many windows, and no more text is tokenized than they need; None: as many as there
    are. Raises TextError for text that does not fill one window, or has tokens that the model lacks.
    """
    prefix = tokenizer.prefix
    if count is not None and count < 1:
        raise TextError(f"{count} windows were asked for. Use 1 or more.")
    body = length - len(prefix)
    if body < 2:
        raise TextError(f"windows of {length} tokens are too short. Use at least 8.")
    wanted = None if count is None else count * body
    parts: list[NDArray[np.int32]] = []
    found = 0
    for ids in _tokens(tokenizer, documents, wanted):
        parts.append(ids)
        found += len(ids)
    num_windows = found // body if count is None else min(found // body, count)
    if num_windows == 0:
        raise TextError(
            f"the text has {found} tokens, less than one window of {length}. "
            "Use a longer text or a shorter --length."
        )
    tokens = torch.from_numpy(np.concatenate(parts)[: num_windows * body])
    windows = torch.empty(num_windows, length, dtype=torch.int64)
    windows[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    windows[:, len(prefix) :] = tokens.view(num_windows, body)
    return windows


def shortfall(windows: Tensor, asked: int, columns: int = 0) -> list[str]:
    """What to warn of where a text gave fewer windows [n, length] than were asked for.

    columns: input columns of the widest layer, where second moments of the inputs are used.
    """
    warnings = []
    if len(windows) < asked:
        warnings.append(
            f"the text gives {len(windows)} of the {asked} windows of {windows.shape[1]} tokens that were "
            "asked for. Give more text for a better result."
        )
    if windows.numel() < columns:
        warnings.append(
            f"{windows.numel()} tokens of calibration text are fewer than the {columns} input columns of a "
            "layer: the result fits this text, and other text less. Give more."
        )
    return warnings


def _tokens(
    tokenizer: Tokenizer, documents: Sequence[Document], wanted: int | None
) -> Iterator[NDArray[np.int32]]:
    """Token ids of the documents, until `wanted` are there; None: of all."""
    for document in documents:
        ids = _encode(tokenizer, _as_text(tokenizer, document), wanted)
        yield ids
        if wanted is not None:
            wanted -= len(ids)
            if wanted <= 0:
                return


def _encode(tokenizer: Tokenizer, text: str, wanted: int | None) -> NDArray[np.int32]:
    """The first `wanted` tokens of a text, or all: in time and memory by what is wanted."""
    if wanted is not None:
        size = _CHARACTERS * (wanted + _UNCERTAIN)
        while size < len(text):
            ids = tokenizer.encode(text[:size], special=False)
            if len(ids) >= wanted + _UNCERTAIN:
                return np.array(ids[:wanted], dtype=np.int32)
            size *= 2
    return np.array(tokenizer.encode(text, special=False), dtype=np.int32)


def _as_text(tokenizer: Tokenizer, document: Document) -> str:
    """What stands in a window for a document. Raises TextError for a conversation without a template."""
    if isinstance(document, str):
        return document + "\n\n"
    return tokenizer.chat(document, opens_reply=False).removeprefix(tokenizer.bos_token or "")


def tensor_sha256(windows: Tensor) -> str:
    """Hash of token ids: equal hashes are equal calibration or training data."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
