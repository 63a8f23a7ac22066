import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import FAMILIES, MIXTURES
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinier.calibration import DecoderWalk
from tinier.checkpoint import Checkpoint
from tinier.errors import InputError
from tinier.families import geometry_of, open_model
from tinier.pruning import Cut, PrunePlan, Sizes, divergences, measure_importance, prune
from tinier.pruning.importance import cut_to
from tinier.pruning.latency import StepTime
from tinier.pruning.plan import resized

Tiny = Callable[..., Checkpoint]
TEXT = ["The quick brown fox jumps over the lazy dog. " * 40]
CPU = torch.device("cpu")


def windows(count: int = 4, length: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def logits(checkpoint: Checkpoint) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    with torch.no_grad():
        found: Tensor = model(windows()).logits
    return found


def silence(source: Checkpoint, names: list[str], keep: Tensor, dim: int) -> Checkpoint:
    """The model with everything but `keep` along `dim` of the named tensors set to zero."""
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    for name in names:
        mask = torch.zeros(tensors[name].shape[dim])
        mask[keep] = 1
        shape = [1] * tensors[name].dim()
        shape[dim] = -1
        tensors[name] *= mask.view(shape)
    save_file(tensors, path, {"format": "pt"})
    return open_model(source.folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_neurons_and_heads_it_is_the_original_with_them_masked(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    source = tiny(family)
    plan = PrunePlan(keep_intermediate=64, keep_kv_heads=1, refit=False, windows=2, length=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    if family == "olmo2":  # q and k are normed over all heads: those that stay are others
        assert made.manifest is not None
        assert any("heads that stay change" in warning for warning in made.manifest.warnings)
        return
    geometry = geometry_of(open_model(made.folder))
    assert (geometry.heads, geometry.kv_heads) == (2, 1)
    assert geometry.intermediate == 64
    assert geometry.head_dim == 16
    scores = measure_importance(source, _calibration(source, plan), device=CPU)
    heads, _ = scores.kept_heads(geometry_of(source), 2, 1)
    neurons = scores.kept_neurons(64)
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        channels = (heads[layer].unsqueeze(1) * 16 + torch.arange(16)).flatten()
        silence(source, [f"{prefix}.self_attn.o_proj.weight"], channels, 1)
        for number, (_, last) in enumerate(geometry.blocks[1:]):
            kept = neurons[layer][number] if family in MIXTURES else neurons[layer]
            silence(source, [f"{prefix}.{last.readers[0]}.weight"], kept, 1)
    assert torch.allclose(logits(made), logits(source), atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_carry_least_go_and_tokens_choose_among_the_others(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    source = tiny(family)
    plan = PrunePlan(keep_experts=4, refit=False, windows=2, length=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    geometry, before = geometry_of(made), geometry_of(source)
    assert (geometry.experts, before.experts) == (4, 6)
    kept = measure_importance(source, _calibration(source, plan), device=CPU).kept_experts(4)
    # the original whose routers cannot choose the others
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    log_probs = logits(made)
    written = load_file(made.folder / "model.safetensors")
    assert before.mixture is not None
    for layer in range(4):
        block = f"model.layers.{layer}.{before.mixture.block}"
        rows = tensors[f"{block}.gate.weight"][kept[layer]]
        assert torch.equal(written[f"{block}.gate.weight"], rows)
        for new, old in enumerate(kept[layer].tolist()):
            name = f"{before.mixture.down}.weight"
            assert torch.equal(
                written[f"{block}.experts.{new}.{name}"], tensors[f"{block}.experts.{old}.{name}"]
            )
    assert torch.isfinite(log_probs).all()
    with pytest.raises(InputError, match="Keep 2 to 6"):
        prune(source, PrunePlan(keep_experts=1), tmp_path / "few", text=TEXT)


def test_the_score_of_an_expert_is_what_it_adds(tiny: Tiny) -> None:
    source = tiny("qwen3-moe", num_hidden_layers=1)
    windows = _calibration(source, PrunePlan(keep_experts=4, windows=2, length=64))
    scores = measure_importance(source, windows, device=CPU).experts[0]
    walk = DecoderWalk(source, 64, CPU)
    layer, hidden = walk.load(0), walk.embed(windows)
    entered: list[torch.Tensor] = []
    layer.get_submodule("mlp").register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    walk.run(layer, hidden, torch.empty_like(hidden))
    expected = torch.zeros(6)
    mixture = layer.get_submodule("mlp")
    with torch.no_grad():
        for x in torch.cat(entered).flatten(0, 1):
            shares, chosen = mixture.gate(x).softmax(dim=-1).topk(2)
            for share, number in zip(shares / shares.sum(), chosen.tolist(), strict=True):
                expected[number] += share * mixture.experts[number](x[None]).norm()
    assert torch.allclose(scores, expected, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_are_zero_change_nothing(
    tiny: Tiny, tmp_path: Path, family: str, tied: bool
) -> None:
    # q and k have fewer channels neither before nor after, and the same epsilon
    epsilon = {"rms_norm_eps": 1e-12} if family == "olmo2" else {}
    source = tiny(family, hidden_size=128, tie_word_embeddings=tied, **epsilon)
    keep = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:64].sort().values
    layers = [f"model.layers.{i}" for i in range(4)]
    silence(source, ["model.embed_tokens.weight"], keep, 1)
    writers = [read.readers[0] for read in geometry_of(source).inputs[1::2]]
    written = [f"{p}.{n}.weight" for p in layers for n in writers]
    source = silence(source, written, keep, 0)
    plan = PrunePlan(keep_hidden=64, windows=2, length=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    assert geometry_of(open_model(made.folder)).hidden == 64
    assert torch.allclose(logits(made), logits(source), atol=1e-4)


def test_heads_are_dropped_inside_their_group(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    plan = PrunePlan(keep_heads=4, windows=2, length=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    geometry = geometry_of(open_model(made.folder))
    assert (geometry.heads, geometry.kv_heads) == (4, 2)
    scores = measure_importance(source, _calibration(source, plan), device=CPU)
    kept, groups = scores.kept_heads(geometry_of(source), 4, 2)
    assert all(((heads < 4).sum(), (heads >= 4).sum()) == (2, 2) for heads in kept.values())
    assert all(kv.tolist() == [0, 1] for kv in groups.values())


def test_scores_are_their_definitions(tiny: Tiny) -> None:
    source = tiny()
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.__setitem__("mlp", x[0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.__setitem__("heads", x[0]))
    with torch.no_grad():
        states = model(windows(), output_hidden_states=True).hidden_states
    found = measure_importance(source, windows(), device=CPU)

    def scored(x: Tensor) -> Tensor:
        return x.abs().mean(dim=1).square().sum(dim=0)

    assert torch.allclose(found.neurons[1], scored(seen["mlp"]).sqrt(), rtol=1e-4)
    assert torch.allclose(
        found.heads[1], scored(seen["heads"]).view(4, 16).sum(dim=1).sqrt(), rtol=1e-4
    )
    for i in range(3):  # transformers' last state is normed
        cosine = torch.cosine_similarity(states[i], states[i + 1], dim=-1).mean().item()
        assert found.influence[i].item() == pytest.approx(1 - cosine, abs=1e-5)
    turn = torch.arccos(torch.cosine_similarity(states[1][:, -1], states[3][:, -1], dim=-1))
    assert found.angular[1, 3].item() == pytest.approx((turn / torch.pi).mean().item(), abs=1e-4)


def test_scores_are_measured_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinier.pruning import importance

    source = tiny(seed=11)
    first = measure_importance(source, windows(), device=CPU)
    monkeypatch.setattr(importance, "_measure", lambda *_: pytest.fail("measured again"))
    again = measure_importance(source, windows(), device=CPU)
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.angular, again.angular)


def test_a_trial_is_the_divergence_of_the_written_model(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(hidden_size=128)
    geometry = geometry_of(source)
    importance = measure_importance(source, windows(), device=CPU)
    sizes = Sizes(layers=3, hidden=64, intermediate=64, heads=2, kv_heads=1)
    cuts = [
        Cut(layers=(0, 1, 2, 3)),
        Cut(layers=(0, 3)),
        Cut(layers=(0, 2, 3)),
        cut_to(geometry, sizes, (0, 2, 3), importance),
        cut_to(geometry, dataclasses.replace(sizes, layers=4), (0, 1, 2, 3), importance),
    ]
    found = divergences(source, windows(), cuts, CPU)
    assert found[0] == pytest.approx(0, abs=1e-6)
    original = torch.log_softmax(logits(source), dim=-1)
    plans = [
        (1, PrunePlan(drop_layers=(1, 2), refit=False)),
        (2, PrunePlan(drop_layers=(1,), refit=False)),
    ]
    for number, plan in plans:
        made = prune(source, plan, tmp_path / str(number))
        own = torch.log_softmax(logits(made), dim=-1)
        kl = (original.exp() * (original - own)).sum(dim=-1).mean().item()
        assert found[number] == pytest.approx(kl, rel=1e-4)
    assert found[3] > 0
    assert found[4] > 0
    assert found[3] != found[4]


@pytest.mark.parametrize("unit", ["M", "MB"])
def test_a_target_is_met_from_below(tiny: Tiny, tmp_path: Path, unit: str) -> None:
    source = tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=6)
    total = geometry_of(source).parameters
    asked = 0.6 * total * (4 if unit == "MB" else 1) / 1e6  # float32: four bytes each
    plan = PrunePlan(target=f"{asked:.4f}{unit}", align=16, candidates=4, windows=2, length=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    after = geometry_of(open_model(made.folder)).parameters
    assert 0.95 * 0.6 * total <= after <= 0.6 * total
    assert made.manifest is not None
    trials = made.manifest.measures["trials"]
    assert len(trials) == 4
    assert trials[0]["kl"] == min(trial["kl"] for trial in trials)
    sizes = made.manifest.measures["sizes"]
    assert {name: trials[0][name] for name in sizes} == sizes


def test_a_step_s_time_is_measured_on_the_engine(tiny: Tiny) -> None:
    source = tiny()
    sizes = Sizes.of(geometry_of(source))
    assert StepTime(source, CPU).measure(dataclasses.replace(sizes, layers=2)) > 0


def test_a_step_s_time_is_linear_between_what_was_measured(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=6)
    geometry = geometry_of(source)

    def milliseconds(sizes: Sizes) -> float:
        after = resized(geometry, sizes)
        layers = sizes.layers * (0.3 + 1e-6 * after.layer_parameters)
        return layers + 0.7 + 2e-6 * after.vocab * after.hidden

    time = StepTime(source, CPU)
    monkeypatch.setattr(time, "measure", milliseconds)
    whole = Sizes.of(geometry)
    for sizes in (whole, dataclasses.replace(whole, layers=3, hidden=96, intermediate=192)):
        assert time(sizes) == pytest.approx(milliseconds(sizes))


def test_a_target_that_cannot_be_met_says_how_far_it_goes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("the text was looked at before the sizes")

    monkeypatch.setattr("tinier.pruning.choice.measure_importance", measured)
    with pytest.raises(InputError, match="The smallest has .* parameters; use"):
        prune(
            tiny(), PrunePlan(target="0.02M", windows=2, length=64), tmp_path / "out",
            text=TEXT,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def _calibration(source: Checkpoint, plan: PrunePlan) -> Tensor:
    from tinier.pruning.plan import calibration_windows

    return calibration_windows(source, plan, TEXT)
