"""Mixed precision: what is measured is what happens, and the choice is better than one format for all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import DOCUMENTS, quantize_tiny

from tinier.calibration import DecoderWalk
from tinier.checkpoint import Checkpoint
from tinier.engine.decoder import load_decoder
from tinier.evaluation import evaluate_windows, reference_states
from tinier.families import checkpoint_layout, geometry_of, linear_names
from tinier.quantization import QuantizePlan, quantize
from tinier.quantization.mixed import (
    Rounded,
    divergences,
    final_states,
    measure_parts,
    one_each,
    parts_of,
    predicted_costs,
)
from tinier.quantization.plan import average_bits, format_named, mixed_formats, table_group
from tinier.schemes import preset_named
from tinier.text import token_windows
from tinier.tokenizer import load_tokenizer

Tiny = Callable[..., Checkpoint]


@pytest.fixture
def windows(tiny: Tiny) -> torch.Tensor:
    return token_windows(load_tokenizer(tiny()), DOCUMENTS, length=64, count=8)


def rounded(source: Checkpoint, folder: Path) -> Rounded:
    labels = ("int4-gptq:32", "int4-gptq:16", "int8-w8a16", "int8-sq")
    formats = {label: format_named(label) for label in labels}
    walk = DecoderWalk(source, 64, torch.device("cpu"))
    return Rounded(source, walk, formats, parts_of(geometry_of(source)), folder)


def whole_divergences(
    parts: Rounded, choices: list[dict[str, str]], windows: torch.Tensor
) -> list[float]:
    exact, *states = final_states(parts, [{}, *choices], windows)
    return divergences(parts, exact, states, choices)


@pytest.mark.parametrize(
    ("label", "ends"),
    [
        ("int4-gptq:32", {}),
        ("int8-sq", {}),  # factors that are folded into norms and other layers
        ("int8-w8a16", {"embedding": "int4", "kv": "fp8"}),
    ],
)
def test_a_whole_model_of_parts_diverges_as_the_quantized_one(
    tiny: Tiny, tmp_path: Path, windows: torch.Tensor, label: str, ends: dict[str, str]
) -> None:
    """Put together from parts, and quantized as a whole, whose inputs are those of quantized layers."""
    source = tiny(dtype=torch.float32)
    parts = rounded(source, tmp_path / "parts")
    parts.make(windows)
    choice = dict.fromkeys((part.name for part in parts.parts), label) | ends
    found = whole_divergences(parts, [choice, {}], windows)
    size = label.partition(":")[2]
    plan = QuantizePlan(
        preset="int4-gptq", group_size=int(size or table_group(geometry_of(source))),
        layer_formats=dict.fromkeys(linear_names(geometry_of(source))[:-1], label),
        windows=8, length=64, **ends,
    )  # fmt: skip
    made = quantize(source, plan, tmp_path / "q", text=DOCUMENTS, device="cpu")
    cpu = torch.device("cpu")
    reference = reference_states(load_decoder(source, device=cpu), windows)
    whole = evaluate_windows(load_decoder(made, device=cpu), windows, reference)
    assert whole.kl is not None
    assert found[0] == pytest.approx(whole.kl, rel=0.2)
    assert found[1] == pytest.approx(0, abs=1e-9)


def test_a_part_alone_is_measured_in_the_original_model(
    tiny: Tiny, tmp_path: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(dtype=torch.float32)
    parts = rounded(source, tmp_path / "parts")
    parts.make(windows)
    labels = ["int4-gptq:32", "int8-w8a16"]
    found = measure_parts(parts, labels, windows)
    for name in (parts.parts[1].name, parts.parts[-1].name):
        for label in labels:
            whole = whole_divergences(parts, [{name: label}], windows)
            assert found[name][label] == pytest.approx(whole[0], rel=1e-3, abs=2e-8)
    monkeypatch.setattr("tinier.quantization.mixed._STREAMS_BYTES", 300_000)  # a few at once
    assert measure_parts(parts, labels, windows) == found


def test_a_model_that_overflows_is_not_chosen(
    tiny: Tiny, tmp_path: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = rounded(tiny(dtype=torch.float32), tmp_path / "parts")
    parts.make(windows)
    original = Rounded.install

    def broken(self: Rounded, module: torch.nn.Module, index: int, labels: dict[str, str]) -> None:
        original(self, module, index, labels)
        if "int4-gptq:16" in labels.values():
            module.get_parameter("mlp.down_proj.weight").data.fill_(torch.inf)

    monkeypatch.setattr(Rounded, "install", broken)
    choices = [
        dict.fromkeys((part.name for part in parts.parts), label)
        for label in ("int4-gptq:16", "int4-gptq:32")
    ]
    found = whole_divergences(parts, choices, windows)
    assert found[0] == 1000
    assert found[1] < 1


def test_what_was_rounded_is_not_rounded_again(
    tiny: Tiny, tmp_path: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny()
    rounded(source, tmp_path / "parts").make(windows)
    again = rounded(source, tmp_path / "parts")
    (tmp_path / "parts" / "layer-00003.json").unlink()
    made: list[int] = []
    original = Rounded._round
    monkeypatch.setattr(
        Rounded,
        "_round",
        lambda self, index, *rest: (made.append(index), original(self, index, *rest)),
    )
    before = json.loads((tmp_path / "parts" / "layer-00002.json").read_text())
    again.make(windows)
    assert made == [3]
    assert before.items() <= again.errors().items()


def test_costs_lie_between_what_was_measured() -> None:
    errors = {"x": {"a": 4.0, "b": 2.0, "c": 1.0, "d": 8.0}}
    costs = predicted_costs(errors, {"x": {"a": 0.4, "c": 0.2}})
    assert costs["x"] == pytest.approx({"a": 0.4, "b": 0.2 + 0.2 / 3, "c": 0.2, "d": 0.4})


def test_bits_are_spent_where_they_save_most(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(num_hidden_layers=3)
    made = quantize_tiny(source, "mixed", tmp_path / "out", bits=4.2, group_size=None)
    layout = checkpoint_layout(made)
    assert layout is not None
    for i in range(3):  # what engines fuse is stored alike
        own = {layout.schemes[f"model.layers.{i}.self_attn.{p}_proj"] for p in "qkv"}
        assert len(own) == 1
    assert len(set(layout.schemes.values())) > 1
    stored = sum(i.num_bytes for n, i in made.tensors.items() if "_proj" in n and "shape" not in n)
    with source.reader() as read:
        weights = sum(read(name).numel() for name in source.tensors if "_proj" in name)
    assert 3.9 < 8 * stored / weights <= 4.2
    assert made.manifest is not None
    found = made.manifest.measures["mixed"]
    assert found["formats"].keys() == layout.schemes.keys()
    assert found["tried"] > 1
    assert not list((tmp_path / "out").glob(".*"))


def test_formats_that_are_asked_for_are_the_only_ones(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(
        tiny(),
        "mixed",
        tmp_path / "out",
        bits=6.5,
        group_size=None,
        formats=("int4-gptq:32", "fp8-gptq"),
    )
    layout = checkpoint_layout(made)
    assert layout is not None
    assert {s.label for s in layout.schemes.values()} == {"INT4 W4A16 g32", "FP8 W8A8"}


def test_learned_rounding_comes_closer_in_the_same_formats(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(num_hidden_layers=2)
    found, kls = [], []
    windows = token_windows(load_tokenizer(source), DOCUMENTS, length=64, count=8)
    exact = load_decoder(source, device=torch.device("cpu"), dtype=torch.float32)
    for preset in ("mixed", "mixed-best"):
        made = quantize_tiny(
            source, preset, tmp_path / preset, bits=3.5, group_size=None, iterations=60
        )
        assert made.manifest is not None
        found.append(made.manifest.measures["mixed"])
        decoder = load_decoder(made, device=torch.device("cpu"), dtype=torch.float32)
        kls.append(evaluate_windows(decoder, windows, reference_states(exact, windows)).kl)
    assert found[0] == found[1]
    assert kls[1] < 0.9 * kls[0]


def test_formats_by_themselves(tiny: Tiny) -> None:
    geometry = geometry_of(tiny())
    formats = mixed_formats(geometry, QuantizePlan(preset="mixed", bits=4.0))
    assert list(formats) == [
        "int2:64", "int2:32", "int3:64", "int3:32", "int4-gptq:64", "int4-gptq:32", "int8-w8a16",
    ]  # fmt: skip
    assert one_each(formats) == ["int2:64", "int3:64", "int4-gptq:64"]
    assert one_each({"fp8": preset_named("fp8")}) == ["fp8"]
    # what lies beyond the largest error that was measured would cost as much as that one
    finer_first = {label: format_named(label) for label in ("int4:32", "int4:128", "int2:32")}
    assert one_each(finer_first) == ["int2:32", "int4:128"]
    names = ["model.layers.0.mlp.down_proj"]
    presets = dict.fromkeys(names, formats["int4-gptq:32"])
    assert average_bits(geometry, presets, torch.bfloat16) == 4.5


def test_what_rounding_to_16_bit_does_anyway_is_no_parts_own(
    tiny: Tiny, tmp_path: Path, windows: torch.Tensor
) -> None:
    """In bf16 every change diverges by the floor; without it, parts are what they are in float32."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        source = tiny(dtype=dtype, name=str(dtype))
        parts = rounded(source, tmp_path / f"parts-{dtype}")
        parts.make(windows)
        measured = measure_parts(parts, ["int8-w8a16", "int4-gptq:16"], windows)
        found[dtype] = {
            label: sum(kls[label] for kls in measured.values()) for label in ("int8-w8a16", "int4-gptq:16")
        }  # fmt: skip
        plain = whole_divergences(parts, [{parts.parts[0].name: "int8-w8a16"}], windows)[0]
        found[dtype]["alone"] = plain
    exact, half = found[torch.float32], found[torch.bfloat16]
    assert half["alone"] > 3 * exact["alone"]  # the floor is there
    assert half["int8-w8a16"] < 0.5 * half["alone"] * 16
    assert half["int4-gptq:16"] == pytest.approx(exact["int4-gptq:16"], rel=0.3)
