"""Weights of tokens are the squares of gradients that a whole model's backward pass gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import DOCUMENTS, FAMILIES, quantize_tiny
from transformers import AutoModelForCausalLM

from tinier.calibration import DecoderWalk, LayerWeights, fisher, observe, token_weights
from tinier.checkpoint import Checkpoint, open_checkpoint
from tinier.errors import SchemeError
from tinier.families import geometry_of, layer_name
from tinier.quantization import QuantizePlan, plan_quantize
from tinier.ranks import ALONE

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


def windows(count: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(3))


def drawn(probabilities: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return probabilities.argmax(-1, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("few_states", [False, True])
def test_weights_are_squares_of_a_whole_models_gradients(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str, few_states: bool
) -> None:
    monkeypatch.setattr(fisher, "_draw", drawn)  # the likeliest token in place of a drawn one
    monkeypatch.setattr(fisher, "_MOST", 1e9)
    if few_states:  # window after window
        monkeypatch.setattr(fisher, "STATES_BYTES", 1)
    checkpoint, tokens = tiny(family), windows()
    geometry = geometry_of(checkpoint)
    walk = DecoderWalk(checkpoint, tokens.shape[1], CPU)
    found = token_weights(checkpoint, walk, tokens, 0)

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval().requires_grad_(False)
    expected: dict[tuple[int, str], torch.Tensor] = {}
    kinds = [read for read in geometry.inputs if geometry.expert_of(read.readers[0]) is None]
    for index in range(geometry.layers):
        for read in kinds:
            for reader in read.readers:
                key = index, read.name

                def back(
                    _: object, __: object, grads: tuple[torch.Tensor], key: tuple[int, str] = key
                ) -> None:
                    expected[key] = expected.get(key, 0) + grads[0].square().sum(-1)  # type: ignore[operator]

                model.get_submodule(f"{layer_name(index)}.{reader}").register_full_backward_hook(
                    back
                )  # type: ignore[arg-type]
    outputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(
            lambda _, __, grads, index=index: outputs.update({index: grads[0].square()})
        )
    embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits.flatten(0, 1)
    F.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
    for index in range(geometry.layers):
        assert found[index].inputs.keys() == {read.name for read in kinds}
        for name, weights in found[index].inputs.items():
            own = expected[index, name]
            torch.testing.assert_close(weights, own / own.mean(), rtol=2e-3, atol=2e-4)
        for weights, dims in ((found[index].tokens, (2,)), (found[index].channels, (0, 1))):
            own = outputs[index].sum(dims)
            torch.testing.assert_close(weights, own / own.mean(), rtol=2e-3, atol=2e-4)


def test_no_token_is_all_that_counts(tiny: Tiny) -> None:
    checkpoint, tokens = tiny(), windows()
    for of in token_weights(checkpoint, DecoderWalk(checkpoint, tokens.shape[1], CPU), tokens, 0):
        for weights in (*of.inputs.values(), of.tokens, of.channels):
            assert weights.mean() == pytest.approx(1.0, abs=1e-5)
            assert weights.max() <= fisher._MOST * 2


def test_weighted_moments(tiny: Tiny) -> None:
    checkpoint, tokens = tiny(), windows(7, 40)
    geometry, walk = geometry_of(checkpoint), DecoderWalk(checkpoint, 40, CPU)
    walk.batch_windows = 3
    hidden, layer = walk.embed(tokens), walk.load(0)
    name = geometry.inputs[0].name
    seen = []
    layer.get_submodule(geometry.inputs[0].readers[0]).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    walk.run(layer, hidden, torch.empty_like(hidden))
    x = torch.cat(seen).flatten(0, 1).float()
    weights = torch.rand(7, 40) * 3
    found, _ = observe(
        walk,
        layer,
        geometry,
        hidden,
        7,
        ALONE,
        moments=[name],
        weights=LayerWeights({name: weights}, weights, weights),
    )
    weighted = x * weights.flatten().unsqueeze(1)
    torch.testing.assert_close(found[name].moments, weighted.t() @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found[name].mean_square, (weighted * x).mean(0), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found[name].mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_quantized_with_weights_and_again_from_what_was_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny()
    plain = quantize_tiny(source, "int4-gptq", tmp_path / "plain")
    whole = quantize_tiny(source, "int4-gptq", tmp_path / "whole", weighting="fisher")
    assert whole.hash != plain.hash
    assert not list((tmp_path / "whole").glob(".*"))

    # stopped after the weights were there, it goes on with these
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    best = [
        quantize_tiny(source, "int4-best", tmp_path / f"best-{weighting}", weighting=weighting)
        for weighting in ("none", "fisher")
    ]
    assert best[0].hash != best[1].hash
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tinier.quantization.driver.quantize_layer", broken)
        quantize_tiny(source, "int4-gptq", tmp_path / "again", weighting="fisher")
    monkeypatch.setattr("tinier.quantization.driver.token_weights", broken)
    quantize_tiny(source, "int4-gptq", tmp_path / "again", weighting="fisher")
    assert open_checkpoint(tmp_path / "again").hash == whole.hash


def test_weighting_where_nothing_is_weighted_is_refused(tiny: Tiny) -> None:
    plan = QuantizePlan(preset="int4", group_size=32, weighting="fisher")
    with pytest.raises(SchemeError, match="minimize errors of outputs, and int4 does not"):
        plan_quantize(tiny(), plan, DOCUMENTS)
    with pytest.raises(SchemeError, match="Use none or fisher"):
        QuantizePlan(preset="int4-gptq", weighting="hessian")  # type: ignore[arg-type]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).expand(20_000, 4)
    drawn = fisher._draw(probabilities, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.015)
