"""What a draft is worth: what both models say is counted, and what it gains measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import quantize_tiny

from tinier.benchmark import Workload, bench
from tinier.checkpoint import Checkpoint
from tinier.engine import load_decoder
from tinier.evaluation import compare_draft, heldout_windows

Tiny = Callable[..., Checkpoint]


def test_agreement_is_that_of_whole_logits(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(initializer_range=0.1, max_position_embeddings=256)
    draft = quantize_tiny(model, "int4", tmp_path / "int4")
    found = compare_draft(model, draft, windows=3, length=200, device="cpu")
    windows = heldout_windows(model, draft, "builtin", 3, 200)
    logits = []
    for checkpoint in (model, draft):
        decoder = load_decoder(checkpoint, device=torch.device("cpu"), int4_inputs="int8")
        logits.append(decoder.logits(decoder.hidden_states(windows)).float().flatten(0, 1))
    one, other = (torch.softmax(x, -1) for x in logits)
    assert found.greedy == pytest.approx(
        (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
    )
    assert found.overlap == pytest.approx(
        1 - (one - other).abs().sum(-1).mean().item() / 2, abs=1e-4
    )
    assert found.drawn < found.overlap + 0.05
    assert found.tokens == 600
    assert found.gain > 0
    assert found.accepted is None or 0 <= found.accepted <= 1


def test_a_model_is_its_own_perfect_draft(tiny: Tiny) -> None:
    model = tiny(max_position_embeddings=256)
    found = compare_draft(model, model, windows=1, length=128, device="cpu")
    assert (found.greedy, found.drawn) == (1, 1)
    assert found.overlap == pytest.approx(1)


def test_the_benchmark_measures_a_model_with_its_draft_too(tiny: Tiny) -> None:
    model = tiny(max_position_embeddings=256)
    workload = Workload(concurrency=2, input_length=32, output_length=16)
    asked = {"base": "m", "repeats": 1, "seed": 0, "device": "cpu"}
    found = bench({"m": model}, workload, draft="prompt", **asked)  # type: ignore[arg-type]
    assert list(found) == ["m", "m with the draft"]
    assert found["m with the draft"].ratio_to_base is not None
    small = replace(workload, concurrency=1)
    found = bench({"m": model}, small, draft=str(model.folder), **asked)  # type: ignore[arg-type]
    assert found["m with the draft"].workload.concurrency == 1
