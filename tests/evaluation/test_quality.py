from collections.abc import Callable

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.engine import load_decoder
from tinier.evaluation import evaluate, reference_states

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


def windows(count: int = 5, length: int = 150) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_computed_from_transformers_logits(tiny: Tiny, family: str) -> None:
    original, other = tiny(family), tiny(family, seed=1, name="other")
    tokens = windows()
    with torch.no_grad():
        base, own = (
            torch.log_softmax(
                AutoModelForCausalLM.from_pretrained(c.folder)
                .eval()(tokens)
                .logits[:, :-1]
                .double(),
                dim=-1,
            )
            for c in (original, other)
        )
    nll = -own.gather(2, tokens[:, 1:, None]).mean()
    kl = (base.exp() * (base - own)).sum(-1).mean()
    agreement = (base.argmax(-1) == own.argmax(-1)).double().mean()
    reference = reference_states(load_decoder(original, device=CPU), tokens)
    found = evaluate(load_decoder(other, device=CPU), tokens, reference)
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement.item(), abs=2e-3)
    assert found.tokens == 5 * 149


def test_a_model_does_not_diverge_from_itself(tiny: Tiny) -> None:
    decoder = load_decoder(tiny(), device=CPU)
    found = evaluate(decoder, windows(), reference_states(decoder, windows()))
    assert found.kl == 0.0
    assert found.top1_agreement == 1.0


def test_without_an_original_there_is_no_divergence(tiny: Tiny) -> None:
    found = evaluate(load_decoder(tiny(), device=CPU), windows())
    assert found.kl is None
    assert found.top1_agreement is None
    assert found.nll_stderr > 0


def test_figures_do_not_depend_on_how_windows_are_batched(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.evaluation import quality

    decoder = load_decoder(tiny(), device=CPU)
    together = evaluate(decoder, windows())
    monkeypatch.setattr(quality, "_BATCH_TOKENS", 1)
    monkeypatch.setattr(quality, "_CHUNK_TOKENS", 7)
    alone = evaluate(decoder, windows())
    assert alone.perplexity == pytest.approx(together.perplexity, rel=1e-6)
