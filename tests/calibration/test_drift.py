"""Corrected weights are those of least squares, from the inputs that both models' layers see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import DOCUMENTS, FAMILIES, quantize_tiny
from torch import Tensor, nn

from tinier.calibration import (
    DecoderWalk,
    Drift,
    DriftSums,
    KeysAndValues,
    LayerWeights,
    drift,
    reaches,
)
from tinier.checkpoint import Checkpoint, open_checkpoint
from tinier.errors import SchemeError
from tinier.evaluation import evaluate
from tinier.families import geometry_of
from tinier.quantization import QuantizePlan, driver, plan_quantize
from tinier.ranks import ALONE

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


def halves(x: Tensor) -> Tensor:
    return (2 * x).round() / 2


def seen_by(
    module: nn.Module, walk: DecoderWalk, hidden: Tensor, names: list[str], cache: Any
) -> dict[str, Tensor]:
    """What modules inside a layer are given [tokens, in]. cache: rounds its keys and values."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found[name].append(inputs[0].flatten(0, -2))
        )
    walk.run(module, hidden, torch.empty_like(hidden), cache)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [False, True])
def test_sums_are_those_of_whole_passes(tiny: Tiny, family: str, changes: bool) -> None:
    """changes: inputs that factors divide and that are rounded, and rounded keys and values."""
    checkpoint = tiny(family)
    geometry, walk = geometry_of(checkpoint), DecoderWalk(checkpoint, 24, CPU)
    walk.batch_windows = 2
    tokens = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(3))
    exact = walk.embed(tokens)
    hidden = exact + 0.1 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(4))
    changed = walk.load(0)
    for name in geometry.linears:
        weight = changed.get_parameter(f"{name}.weight")
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    reads = [r for r in geometry.inputs if geometry.expert_of(r.readers[0]) is None]
    counts = torch.rand(5, 24) * 2
    scale = torch.tensor(0.05)
    cache = KeysAndValues.static("int", scale, scale) if changes else None
    found = Drift(
        walk, walk.load(0), exact, hidden, geometry,
        LayerWeights({read.name: counts for read in reads}, counts, counts), ALONE, cache,
    )  # fmt: skip
    norms = geometry.norm_names
    names = [read.readers[0] for read in reads] + ([norms.mlp_in] if norms.mlp_in else [])
    x, seen = (
        seen_by(module, walk, states, names, kept)
        for module, states, kept in ((walk.load(0), exact, None), (changed, hidden, cache))
    )
    share = counts.flatten().unsqueeze(1) / counts.numel()
    for read in geometry.inputs:
        assert reaches(geometry, read) == (read in reads)
    for read in reads:
        name = read.readers[0]
        factors = torch.linspace(0.5, 2, x[name].shape[1]) if changes else None
        rounding = halves if changes else None
        sums = found.at(read, changed, factors, rounding)
        other = halves(seen[name].float()) if changes else seen[name].float()
        plain = x[name].float() if factors is None else x[name].float() / factors
        expected: list[Tensor | None] = [
            other.t() @ (other * share), (plain - other).t() @ (other * share), None
        ]  # fmt: skip
        if read.name == "self_attn.o_proj" and norms.attention_out is None:
            lost = (exact - hidden).flatten(0, 1)
            expected[2] = (lost / geometry.multipliers.residual).t() @ (other * share)
        if read.name == "mlp.down_proj" and norms.mlp_out is None and norms.mlp_in:
            lost = x[norms.mlp_in] - seen[norms.mlp_in]
            expected[2] = (lost / geometry.multipliers.residual).t() @ (other * share)
        for mine, theirs in zip(sums, expected, strict=True):
            if theirs is None:
                assert mine is None
                continue
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_all_of_a_change_undone_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "STRENGTH", 1.0)
    monkeypatch.setattr(drift, "DAMP", 0.0)
    torch.manual_seed(0)
    shapes = ((6, 16), (200, 16), (200, 6), (16, 16))
    weight, x, stream, mixing = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    seen = x @ mixing
    sums = DriftSums(seen.t() @ seen, (x - seen).t() @ seen, stream.t() @ seen)
    solved = torch.linalg.lstsq(seen, x @ weight.t() + stream).solution.t()
    torch.testing.assert_close(sums.corrected(weight), solved, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "preset", "more"),
    [
        ("llama", "int2", {}),
        ("llama", "int4-best", {"kv": "int8"}),
        ("llama", "w4a8", {"ignore": ("*.q_proj",)}),
        ("llama", "nvfp4", {"group_size": None}),
        ("mixtral", "int4-gptq", {}),
    ],
)
def test_it_brings_the_model_nearer_and_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, preset: str,
    more: dict[str, Any],
) -> None:  # fmt: skip
    source = tiny(family, num_hidden_layers=4)
    options: dict[str, Any] = {"windows": 64} | more
    plain = quantize_tiny(source, preset, tmp_path / "plain", drift="ignored", **options)
    whole = quantize_tiny(source, preset, tmp_path / "whole", drift="corrected", **options)
    kls = [
        evaluate(made, source, text=DOCUMENTS, windows=16, length=64, device="cpu").kl
        for made in (plain, whole)
    ]
    assert whole.hash != plain.hash
    assert kls[0] is not None
    assert kls[1] is not None
    if preset == "int2":
        assert kls[1] < kls[0]
    real, layers = driver.quantize_layer, []

    def stopped(*arguments: Any) -> Any:
        if len(layers) == 2:
            raise KeyboardInterrupt
        layers.append(None)
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(driver, "quantize_layer", stopped)
        quantize_tiny(source, preset, tmp_path / "again", drift="corrected", **options)
    quantize_tiny(source, preset, tmp_path / "again", drift="corrected", **options)
    assert open_checkpoint(tmp_path / "again").hash == whole.hash


def test_drift_where_nothing_is_rounded_by_data_is_refused(tiny: Tiny) -> None:
    with pytest.raises(SchemeError, match="GPTQ or learn to, and int4 does not"):
        plan_quantize(tiny(), QuantizePlan(preset="int4", group_size=32, drift="corrected"))
    with pytest.raises(SchemeError, match="Use ignored or corrected"):
        QuantizePlan(preset="int4-gptq", drift="half")  # type: ignore[arg-type]
