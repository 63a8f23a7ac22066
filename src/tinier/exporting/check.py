"""Whether an export is the model that it was made from: read back, and its logits compared.

One layer of one model is in memory at a time.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint, unpack_linear
from tinier.engine.decoder import load_decoder
from tinier.errors import TinierError
from tinier.exporting.onnx import log_probabilities as graph_log_probabilities
from tinier.families import checkpoint_layout, geometry_of
from tinier.numerics import dequantize
from tinier.schemes import HEAD_LINEAR
from tinier.text import load_calibration, token_windows
from tinier.tokenizer import load_tokenizer

_WINDOWS, _LENGTH = 2, 128
CHECKED_TOKENS = _WINDOWS * _LENGTH
MOST_DIVERGENCE = 1e-6
"""Nats: both are computed in float32, so what is stored in other words has equal logits"""
MOST_ROUNDED = 2**-8
"""Of a tensor's norm: what rounding its numbers to bfloat16 may change"""


class Likeness(NamedTuple):
    kl: float
    """Of the export from its source, nats per token"""
    top_1: float
    """Share of tokens whose likeliest next one is the same"""
    tokens: int

    @property
    def is_same(self) -> bool:
        return self.kl <= MOST_DIVERGENCE


def likeness(source: Checkpoint, made: Checkpoint, device: torch.device) -> Likeness:
    """Compare the logits of two checkpoints of one model on a little text."""
    windows = _windows(source)
    one, other = (_log_probabilities(model, windows, device) for model in (source, made))
    return _compared(one, other)


def graph_likeness(source: Checkpoint, folder: Path, device: torch.device) -> Likeness:
    """Compare a checkpoint with an ONNX graph of it."""
    windows = _windows(source)
    one = _log_probabilities(source, windows, device)
    return _compared(one, graph_log_probabilities(folder, geometry_of(source), windows))


def most_apart(source: Checkpoint, made: Checkpoint) -> float:
    """The largest difference of a layer's numbers from what its codes say, as a share of its norm."""
    layout, worst = checkpoint_layout(source), 0.0
    assert layout is not None
    for name, scheme in layout.schemes.items():
        if name == HEAD_LINEAR and geometry_of(source).tied_head:
            continue
        with source.reader() as read, made.reader() as again:
            codes, _ = unpack_linear(source.optional(read), name, scheme, layout.storage)
            wanted = dequantize(codes, torch.float32)
            apart = (again(f"{name}.weight").float() - wanted).norm() / wanted.norm()
            worst = max(worst, float(apart.nan_to_num(nan=0.0 if not wanted.any() else torch.inf)))
    return worst


def _compared(one: Tensor, other: Tensor) -> Likeness:
    """Of log-probabilities [tokens, vocab]."""
    kl = (one.exp() * (one - other)).sum(dim=-1).mean().item()
    same = (one.argmax(dim=-1) == other.argmax(dim=-1)).float().mean().item()
    return Likeness(max(0.0, kl), same, len(one))


def _windows(source: Checkpoint) -> Tensor:
    """[n, length] of the built-in text; random tokens for a model that has no tokenizer with it."""
    geometry = geometry_of(source)
    limits = [window for window in geometry.windows if window is not None]
    length = min([_LENGTH, geometry.max_positions, *limits])
    try:
        tokenizer = load_tokenizer(source)
    except TinierError:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, geometry.vocab, (_WINDOWS, length), generator=generator)
    documents = load_calibration("builtin")[:1]
    return token_windows(tokenizer, documents, length=length, count=_WINDOWS)


def _log_probabilities(model: Checkpoint, windows: Tensor, device: torch.device) -> Tensor:
    decoder = load_decoder(model, device=device, dtype=torch.float32, on_demand=True)
    hidden = decoder.hidden_states(windows).flatten(0, 1)
    return decoder.logits_float32(hidden).log_softmax(dim=-1).cpu()
