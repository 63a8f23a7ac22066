"""Scores of continuations are what transformers' logits say, however they share rows and batches."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.engine import load_decoder
from tinier.evaluation import likelihood
from tinier.evaluation.likelihood import score_continuations

Tiny = Callable[..., Checkpoint]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_scores_are_those_of_transformers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(likelihood, "_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(likelihood, "_CHUNK_TOKENS", 3)
    checkpoint = tiny()
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(250, (count,), generator=generator).tolist()

    context, shared = ids(9), ids(4)
    pairs = [
        (context, [*shared, 7]), (context, [*shared, 8]),  # one row, two last tokens
        (context, ids(1)), (ids(20), ids(6)), (ids(1), ids(1)), (context, [*shared, 7]),
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    with torch.no_grad():
        # the likeliest continuation of the first context, which is greedy
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    pairs.append((context, [best]))
    found = score_continuations(load_decoder(checkpoint, device=torch.device("cpu")), pairs, "")
    for (before, after), score in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(after).unsqueeze(1)).sum()
        assert score.logprob == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
        assert score.greedy == bool((logits.argmax(-1) == torch.tensor(after)).all())
    assert found[-1].greedy
    assert found[0] == found[5]
