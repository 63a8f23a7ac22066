"""What a smaller model is worth as the draft of another. Start at `compare_draft`.

Over held-out text: how often it would be right. In the engine: what that gains here, for one request.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.device import pick_device
from tinier.engine import Decoder, Engine, EngineConfig, SamplingParams, load_decoder
from tinier.engine.drawing import keys, noise
from tinier.evaluation.models import heldout_windows
from tinier.evaluation.quality import reference_states
from tinier.progress import bar
from tinier.text import BUILTIN, Text

_CHUNK_TOKENS = 128
# texts that are written with and without the draft, the first to warm up
_TEXTS, _PROMPT, _OUTPUT = 6, 64, 96


@dataclass(frozen=True, kw_only=True)
class DraftForecast:
    greedy: float
    """Share of tokens where both models' likeliest next token is the same."""
    drawn: float
    """Probability, a mean over tokens, that both draw the same at temperature 1."""
    overlap: float
    """One minus the total variation of both distributions: what no way of drafting exceeds."""
    tokens: int
    """Positions of the text."""
    tokens_per_s: float
    """Of greedy texts, one at a time, without the draft."""
    gain: float
    """With the draft over that: median over texts that both write by turns."""
    accepted: float | None
    """Share of the drafted tokens that were right there; None: it does not pay, and was only tried."""


def compare_draft(
    model: Checkpoint,
    draft: Checkpoint,
    *,
    text: Text = BUILTIN,
    windows: int = 8,
    length: int = 512,
    device: str = "auto",
) -> DraftForecast:
    """How often `draft` says what `model` says, and what it gains as its draft.

    windows: of `length` tokens, at most. Raises InputError for models of different tokens or too long
    windows, TextError for too short a text, before anything is loaded.
    """
    place = pick_device(device)
    held = heldout_windows(model, draft, text, windows, length)
    first, second = (
        load_decoder(checkpoint, device=place, int4_inputs="int8") for checkpoint in (model, draft)
    )
    return measure_draft(first, second, held)


def measure_draft(model: Decoder, draft: Decoder, windows: Tensor) -> DraftForecast:
    """The same of loaded models on windows [n, length] of token ids."""
    greedy, drawn, overlap = _agreement(model, draft, windows)
    gains, rates, drafted, accepted = _gains(model, draft, windows)
    return DraftForecast(
        greedy=greedy, drawn=drawn, overlap=overlap, tokens=windows.numel(),
        tokens_per_s=statistics.median(rates), gain=statistics.median(gains),
        accepted=accepted / drafted if drafted else None,
    )  # fmt: skip


@torch.inference_mode()
def _agreement(first: Decoder, second: Decoder, windows: Tensor) -> tuple[float, float, float]:
    """Means over windows [n, length]: the same likeliest token, the same drawn one, overlap."""
    states = [reference_states(decoder, windows) for decoder in (first, second)]
    sums = torch.zeros(3, dtype=torch.float64)
    with bar("agreement", len(windows)) as advance:
        for index in range(len(windows)):
            for start in range(0, windows.shape[1], _CHUNK_TOKENS):
                rows = slice(start, start + _CHUNK_TOKENS)
                one, other = (
                    decoder.logits(state.hidden[index][rows].to(state.device)).float()
                    for decoder, state in zip((first, second), states, strict=True)
                )
                common = min(one.shape[1], other.shape[1])
                sums += _sums(one[:, :common], other[:, :common], index)
            advance(1)
    greedy, drawn, overlap = (sums / windows.numel()).tolist()
    return greedy, drawn, overlap


def _sums(one: Tensor, other: Tensor, seed: int) -> Tensor:
    """Over rows of logits [n, vocab] of two models."""
    positions = torch.arange(len(one)).numpy().astype("uint64")
    row_keys = torch.from_numpy(keys(positions * 0 + seed, positions)).to(one.device)
    random = noise(row_keys, one.shape[1])
    same = (one.argmax(-1) == other.argmax(-1)).sum()
    drawn = ((one + random).argmax(-1) == (other + random).argmax(-1)).sum()
    apart = (one.softmax(-1) - other.softmax(-1)).abs().sum() / 2
    return torch.stack([same, drawn, len(one) - apart]).double().cpu()


def _gains(
    model: Decoder, draft: Decoder, windows: Tensor
) -> tuple[list[float], list[float], int, int]:
    """Seconds without over seconds with the draft and tokens/s without it, of each text; tokens that were
    drafted and right."""
    room = min(model.geometry.max_positions, draft.geometry.max_positions)
    given = min(_PROMPT, windows.shape[1], room // 2)
    output = min(_OUTPUT, room - given)
    config = EngineConfig(
        max_batch_size=1, max_seq_len=given + output, device=str(model.device), reuse_prefixes=False
    )
    plain, drafting = Engine(model, config), Engine(model, config, draft=draft)
    params = SamplingParams(max_tokens=output)
    gains, rates, counts = [], [], [0, 0]
    with bar("texts", _TEXTS) as advance:
        for turn in range(_TEXTS):
            prompt = windows[turn % len(windows)][:given].tolist()
            seconds = {}
            for engine in (plain, drafting) if turn % 2 else (drafting, plain):
                started = time.perf_counter()
                engine.generate([prompt], params)
                seconds[engine] = time.perf_counter() - started
            if not turn:  # it warms up, and drafting is measured
                counts = [drafting.num_drafted, drafting.num_accepted]
            else:
                gains.append(seconds[plain] / seconds[drafting])
                rates.append(output / seconds[plain])
            advance(1)
    drafted, accepted = drafting.num_drafted - counts[0], drafting.num_accepted - counts[1]
    is_trial = drafted < 0.1 * len(gains) * output
    return (gains, rates, 0, 0) if is_trial else (gains, rates, drafted, accepted)
