"""Measured through the engine, a model is what it is measured in whole windows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, load_decoder
from tinier.errors import TextError
from tinier.evaluation import (
    MmluPlan,
    evaluate_mmlu,
    evaluate_mmlu_served,
    evaluate_served,
    evaluate_windows,
    load_mmlu,
)
from tinier.tokenizer import Tokenizer

Tiny = Callable[..., Checkpoint]


def served(checkpoint: Checkpoint, longest: int) -> Engine:
    config = EngineConfig(max_seq_len=longest, max_step_tokens=64, overlap=True, device="cpu")
    return Engine(checkpoint, config)


def test_perplexity_is_that_of_whole_windows(tiny: Tiny) -> None:
    checkpoint = tiny("qwen3")
    windows = torch.randint(0, 256, (5, 48), generator=torch.Generator().manual_seed(0))
    whole = evaluate_windows(load_decoder(checkpoint, device=torch.device("cpu")), windows)
    ours = evaluate_served(served(checkpoint, 49), windows)
    assert ours.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert ours.nll_stderr == pytest.approx(whole.nll_stderr, rel=1e-4)
    assert ours.tokens == whole.tokens
    assert ours.kl is None


@pytest.mark.parametrize("shots", [0, 3])
def test_mmlu_is_that_of_whole_windows(tiny: Tiny, mmlu_folder: Path, shots: int) -> None:
    checkpoint = tiny(max_position_embeddings=2048)
    mmlu = load_mmlu(MmluPlan(folder=mmlu_folder, shots=shots))
    tokenizer = Tokenizer(byte_tokenizer())
    decoder = load_decoder(checkpoint, device=torch.device("cpu"))
    engine = served(checkpoint, 2048)
    assert evaluate_mmlu_served(engine, tokenizer, mmlu, shots) == evaluate_mmlu(
        decoder, tokenizer, mmlu, shots
    )
    assert engine.num_free_blocks == engine.num_blocks
    with pytest.raises(TextError, match="this model has room for 20"):
        evaluate_mmlu_served(served(checkpoint, 20), tokenizer, mmlu, shots)
