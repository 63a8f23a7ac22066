"""Documents to windows of exactly `length` tokens: nothing padded, nothing cut off mid-batch."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tinier.checkpoint import Checkpoint
from tinier.errors import CheckpointError, TextError
from tinier.text.sources import Document


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError where the folder has none."""
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} has no usable tokenizer ({error}). Put the model's "
            "tokenizer.json and tokenizer_config.json beside config.json."
        ) from None


def token_windows(
    tokenizer: Any, documents: Sequence[Document], *, length: int, count: int | None = None
) -> Tensor:
    """Pack documents end to end into windows of `length` tokens. Returns [windows, length] int64.

    Each window starts with the tokenizer's BOS if it has the habit of adding one, because that is
    what the model sees when it serves. A conversation is written with the model's chat template, whose
    own BOS is left out: there is one at the start of each window and no other.
    count: at most so many windows; None: as many as there are.
    Raises TextError for text that does not fill one window.
    """
    prefix: list[int] = tokenizer("")["input_ids"]
    if count is not None and count < 1:
        raise TextError(f"{count} windows were asked for. Use 1 or more.")
    body = length - len(prefix)
    if body < 2:
        raise TextError(f"windows of {length} tokens are too short. Use at least 8.")
    tokens: list[int] = []
    for document in documents:
        text = _as_text(tokenizer, document)
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if count is not None and len(tokens) >= count * body:
            break
    num_windows = len(tokens) // body
    if count is not None:
        num_windows = min(num_windows, count)
    if num_windows == 0:
        raise TextError(
            f"the text has {len(tokens)} tokens, less than one window of {length}. "
            "Use a longer text or a shorter --length."
        )
    windows = torch.tensor(tokens[: num_windows * body]).view(num_windows, body)
    return torch.cat((torch.tensor(prefix).long().expand(num_windows, -1), windows), dim=1)


def _as_text(tokenizer: Any, document: Document) -> str:
    """What stands in a window for a document. Raises TextError for a conversation without a template."""
    if isinstance(document, str):
        return document + "\n\n"
    if tokenizer.chat_template is None:
        raise TextError("the text has conversations and the model has no chat template.")
    text: str = tokenizer.apply_chat_template(document, tokenize=False)
    return text.removeprefix(tokenizer.bos_token or "")


def tensor_sha256(windows: Tensor) -> str:
    """Hash of token ids: equal hashes are equal calibration or training data."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
