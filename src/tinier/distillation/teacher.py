"""What the student learns from: the teacher as it runs, or its stored top-k probabilities.

Both answer `targets(part, rows, windows)` with the loss for those windows; `store_top_k` makes the
second from the first, once for all runs on the same windows.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinier.checkpoint import Checkpoint, new_file
from tinier.distillation.losses import RowsLoss, Soft, TopK
from tinier.distillation.plan import DistillPlan
from tinier.distillation.student import hidden_states
from tinier.progress import bar
from tinier.text import tensor_sha256

_CHUNK_TOKENS = 1024


class Teacher(Protocol):
    def targets(
        self, part: str, rows: Tensor, windows: Tensor, *, training: bool
    ) -> tuple[RowsLoss, tuple[Tensor, ...]]:
        """The loss towards this teacher, and its hidden states to compare with.

        part: `training` or `heldout`. rows: which of its windows. windows: [n, length], on the device.
        training: as the plan says; otherwise forward KL at temperature 1, and no hidden states.
        """
        ...


class LiveTeacher:
    """The model itself, which runs beside the student."""

    def __init__(
        self,
        model: Any,
        plan: DistillPlan,
        dtype: torch.dtype,
        layers: tuple[int, ...],
        vocab: int | None = None,
    ) -> None:
        """vocab: tokens that the student knows too; None: all."""
        if dtype == torch.float32:  # products are not cast then
            model = model.float()
        self.model, self._plan, self._dtype, self._layers = model.eval(), plan, dtype, layers
        self._vocab = vocab
        self._heldout: dict[int, Tensor] = {}
        """Final hidden states of the held-out windows, by the first window of the batch."""

    @torch.no_grad()
    def targets(
        self, part: str, rows: Tensor, windows: Tensor, *, training: bool
    ) -> tuple[RowsLoss, tuple[Tensor, ...]]:
        head = self.head.to(self._dtype)
        if not training:
            first = int(rows[0])
            if first not in self._heldout or len(self._heldout[first]) != windows.numel():
                self._heldout[first] = self.hidden(windows)[0]
            return Soft(self._heldout[first], head), ()
        hidden, states = self.hidden(windows, self._layers)
        return Soft(hidden, head, self._plan.loss, self._plan.temperature), tuple(states)

    @property
    def head(self) -> Tensor:
        """[vocab, hidden]"""
        weight: Tensor = self.model.lm_head.weight[: self._vocab]
        return weight

    @torch.no_grad()
    def hidden(self, windows: Tensor, layers: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states [tokens, hidden], and those of `layers`."""
        with torch.autocast(windows.device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden, states = hidden_states(self.model, windows, self._dtype, layers)
        return hidden.flatten(0, 1).to(self._dtype), states


class StoredTeacher:
    """Top-k probabilities on disk: 6 bytes a token for each of the k."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = {part: safe_open(path, framework="pt") for part, path in files.items()}

    def targets(
        self, part: str, rows: Tensor, windows: Tensor, *, training: bool
    ) -> tuple[RowsLoss, tuple[Tensor, ...]]:
        stored = self._files[part]
        log_probs, ids = stored.get_slice("log_probs"), stored.get_slice("ids")
        chosen = rows.tolist()
        return TopK(
            torch.cat([log_probs[i] for i in chosen]).to(windows.device),
            torch.cat([ids[i] for i in chosen]).to(windows.device, torch.int64),
        ), ()


def stored_path(folder: Path, teacher: Checkpoint, windows: Tensor, top_k: int) -> Path:
    """Where the top-k of a teacher on some windows are kept: equal names are equal numbers."""
    key = f"{teacher.hash} {tensor_sha256(windows)} {top_k}"
    return folder / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


@torch.no_grad()
def store_top_k(
    teacher: LiveTeacher, windows: Tensor, top_k: int, path: Path, batch: int, device: torch.device
) -> None:
    """Write log-probabilities [n, length, k] in float16 and ids [n, length, k] in int32."""
    log_probs, ids = [], []
    head = teacher.head
    with bar("teacher", len(windows)) as advance:
        for part in windows.split(batch):
            hidden, _ = teacher.hidden(part.to(device))
            for rows in hidden.split(_CHUNK_TOKENS):
                logits = F.linear(rows, head.to(rows.dtype)).float()
                top = torch.log_softmax(logits, dim=-1).topk(top_k, dim=-1)
                log_probs.append(top.values.half().cpu())
                ids.append(top.indices.int().cpu())
            advance(len(part))
    shape = (*windows.shape, top_k)
    stored = {"log_probs": torch.cat(log_probs).view(shape), "ids": torch.cat(ids).view(shape)}
    with new_file(path) as partial:
        save_file(stored, partial)
