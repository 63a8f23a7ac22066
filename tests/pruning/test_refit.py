from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import FAMILIES, MIXTURES
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.errors import InputError
from tinier.families import geometry_of, open_model
from tinier.pruning import Cut, PrunePlan, measure_importance, prune
from tinier.pruning.plan import calibration_windows
from tinier.pruning.refit import linears_to_refit

Tiny = Callable[..., Checkpoint]
BEHIND_NORMS = ("gemma3", "olmo2")
TEXT = ["The quick brown fox jumps over the lazy dog. " * 40, "Sphinx of black quartz. " * 60]
CPU = torch.device("cpu")


def plan_of(**given: object) -> PrunePlan:
    return PrunePlan(windows=8, length=64, **given)  # type: ignore[arg-type]


def divergence(source: Checkpoint, made: Checkpoint, windows: Tensor) -> float:
    """Of the written model from its source."""
    log_probs = []
    for checkpoint in (source, made):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
        with torch.no_grad():
            log_probs.append(torch.log_softmax(model(windows).logits, dim=-1))
    p, q = log_probs
    return (p.exp() * (p - q)).sum(dim=-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "cut",
    [
        {"drop_layers": (1, 2)},
        {"drop_layers": (3,)},
        {"keep_intermediate": 64},
        {"keep_heads": 2},
        {"keep_layers": 3, "keep_intermediate": 64, "keep_kv_heads": 1},
        {"keep_experts": 4},
        {"keep_experts": 4, "keep_intermediate": 64},
    ],
    ids=str,
)
def test_it_brings_the_model_nearer(
    tiny: Tiny, tmp_path: Path, family: str, cut: dict[str, object]
) -> None:
    source = tiny(family)
    if "keep_experts" in cut and family not in MIXTURES:
        with pytest.raises(InputError, match="is no mixture of experts"):
            prune(source, plan_of(**cut), tmp_path / "refit", text=TEXT)
        return
    plan, plain = plan_of(**cut), plan_of(**cut, refit=False)
    made = prune(source, plan, tmp_path / "refit", text=TEXT)
    without = prune(source, plain, tmp_path / "plain", text=TEXT)
    windows = calibration_windows(source, plan, TEXT)
    assert made.manifest is not None
    assert without.manifest is not None
    if family in (*BEHIND_NORMS, *MIXTURES) and set(cut) == {"drop_layers"}:  # it says so
        assert made.manifest.measures["refitted"] == []
        assert any("nothing stands in for layers" in warning for warning in made.manifest.warnings)
        return
    assert divergence(source, made, windows) < divergence(source, without, windows)
    assert made.manifest.measures["refitted"]
    assert without.manifest.measures["refitted"] == []


def test_it_is_the_least_squares_solution(tiny: Tiny, tmp_path: Path) -> None:
    """Against torch's solver on the stacked problem, with damping as rows of its own."""
    source = tiny()
    plan = plan_of(drop_layers=(2,), keep_intermediate=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    windows = calibration_windows(source, plan, TEXT)
    kept = measure_importance(source, windows, device=CPU).kept_neurons(64)[1]
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    seen: dict[str, Tensor] = {}
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y))
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    x = seen["x"].flatten(0, 1)[:, kept].double()
    y = (seen["y"] + states[3] - states[2]).flatten(0, 1).double()
    weight = down.weight.detach()[:, kept].double()
    damping = torch.diag(0.1 * x.square().mean(dim=0)).sqrt()
    # as rows of their own; the mean over tokens is a sum here
    damping = damping * len(x) ** 0.5
    rows, wanted = torch.cat((x, damping)), torch.cat((y, damping @ weight.t()))
    solution = torch.linalg.lstsq(rows, wanted).solution.t()
    written = load_file(made.folder / "model.safetensors")
    own = written["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(own.double(), solution, atol=1e-4 * solution.abs().max().item())


def test_parts_that_do_nothing_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("mlp.up_proj.weight"):
            tensors[name][64:] = 0
    save_file(tensors, path, {"format": "pt"})
    source = open_model(source.folder)
    made = prune(source, plan_of(keep_intermediate=64), tmp_path / "out", text=TEXT)
    written = load_file(made.folder / "model.safetensors")
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.allclose(written[name], tensors[name][:, :64], atol=1e-5)


def test_what_is_solved_for(tiny: Tiny) -> None:
    geometry = geometry_of(tiny())
    some = {layer: torch.arange(1) for layer in range(4)}
    assert linears_to_refit(Cut(layers=(0, 3)), geometry) == {0: ["mlp.down_proj"]}
    assert linears_to_refit(Cut(layers=(1, 2)), geometry) == {2: ["mlp.down_proj"]}
    assert linears_to_refit(Cut(layers=(2, 3)), geometry) == {}
    heads = linears_to_refit(Cut(layers=(0, 1, 3), heads=some), geometry)
    assert heads[1] == ["self_attn.o_proj", "mlp.down_proj"]
    assert heads[0] == heads[3] == ["self_attn.o_proj"]


def test_it_needs_text(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs calibration text. Give text, or refit=False"):
        prune(tiny(), PrunePlan(drop_layers=(1,)), tmp_path / "out", text=())
    # nothing is left that could stand in for the first layer
    prune(tiny(), PrunePlan(drop_layers=(0,)), tmp_path / "out")
