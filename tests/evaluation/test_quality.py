from collections.abc import Callable

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, load_decoder
from tinier.evaluation import Reference, evaluate_windows, reference_states, written_text
from tinier.evaluation.quality import OWN_PROMPT

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
    found = evaluate_windows(load_decoder(other, device=CPU), tokens, reference)
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement.item(), abs=2e-3)
    assert found.tokens == 5 * 149


def test_a_model_does_not_diverge_from_itself(tiny: Tiny) -> None:
    decoder = load_decoder(tiny(), device=CPU)
    found = evaluate_windows(decoder, windows(), reference_states(decoder, windows()))
    assert found.kl == 0.0
    assert found.top1_agreement == 1.0


def test_without_an_original_there_is_no_divergence(tiny: Tiny) -> None:
    found = evaluate_windows(load_decoder(tiny(), device=CPU), windows())
    assert found.kl is None
    assert found.top1_agreement is None
    assert found.nll_stderr > 0


def test_figures_do_not_depend_on_how_windows_are_batched(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.evaluation import quality

    decoder = load_decoder(tiny(), device=CPU)
    together = evaluate_windows(decoder, windows())
    monkeypatch.setattr(quality, "_BATCH_TOKENS", 1)
    monkeypatch.setattr(quality, "_CHUNK_TOKENS", 7)
    alone = evaluate_windows(decoder, windows())
    assert alone.perplexity == pytest.approx(together.perplexity, rel=1e-6)


def test_only_what_is_not_given_counts(tiny: Tiny) -> None:
    original, other = tiny(), tiny(seed=1, name="other")
    decoder, tokens = load_decoder(other, device=CPU), windows(3, 60)
    reference = reference_states(load_decoder(original, device=CPU), tokens)
    whole, tail = (evaluate_windows(decoder, tokens, reference, given=given) for given in (1, 40))
    head = evaluate_windows(
        decoder, tokens[:, :40], Reference(reference.hidden[:, :40], *reference[1:])
    )
    assert (head.tokens, tail.tokens, whole.tokens) == (3 * 39, 3 * 20, 3 * 59)
    for name in ("kl", "top1_agreement"):
        parts = getattr(head, name) * head.tokens + getattr(tail, name) * tail.tokens
        assert getattr(whole, name) * whole.tokens == pytest.approx(parts, rel=1e-5)


def test_standard_errors_are_over_windows(tiny: Tiny) -> None:
    original, other = tiny(), tiny(seed=1, name="other")
    decoder, tokens = load_decoder(other, device=CPU), windows(4, 60)
    exact = load_decoder(original, device=CPU)
    whole = evaluate_windows(decoder, tokens, reference_states(exact, tokens))
    each = [evaluate_windows(decoder, w, reference_states(exact, w)) for w in tokens.split(1)]
    for name, error in (("kl", whole.kl_stderr), ("top1_agreement", whole.top1_stderr)):
        means = torch.tensor([getattr(one, name) for one in each], dtype=torch.float64)
        assert error == pytest.approx(float(means.std() / 2), rel=1e-6)
    assert each[0].top1_stderr is None


def test_written_text_is_the_likeliest_after_each_prompt(tiny: Tiny) -> None:
    checkpoint, tokens = tiny(), windows(3, 60)
    engine = Engine(checkpoint, EngineConfig(max_seq_len=OWN_PROMPT + 20, device="cpu"))
    written = written_text(engine, tokens, 20)
    assert written.shape == (3, OWN_PROMPT + 20)
    assert torch.equal(written[:, :OWN_PROMPT], tokens[:, :OWN_PROMPT])
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    with torch.no_grad():
        likeliest = model(written).logits.argmax(-1)
    assert torch.equal(likeliest[:, OWN_PROMPT - 1 : -1], written[:, OWN_PROMPT:])
