from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint, open_checkpoint
from tinier.errors import OutputError, SchemeError
from tinier.families import open_model
from tinier.quantization import plan_quantize, quantize

Tiny = Callable[..., Checkpoint]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["fp8", "int8", "int4"])
def test_transformers_loads_it_with_nothing_missing(
    tiny: Tiny, tmp_path: Path, family: str, preset: str
) -> None:
    made = quantize(
        tiny(family, dtype=torch.bfloat16), preset, tmp_path / "out",
        group_size=32 if preset == "int4" else None,
    )  # fmt: skip
    _, info = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    open_model(made.folder)


def test_manifest_says_how_it_was_made(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    made = quantize(source, "int4", tmp_path / "out", group_size=32, ignore=("*.up_proj",))
    manifest = open_checkpoint(made.folder).manifest
    assert manifest is not None
    assert manifest.stage == "quantize"
    assert manifest.parents == {"source": source.hash}
    assert manifest.parameters["scheme"]["weights"]["group_size"] == 32
    assert len(manifest.layers) == 4 * 6
    assert all(10 < measures["snr_db"] < 30 for measures in manifest.layers.values())
    assert "left in 16 bit: model.layers.0.mlp.up_proj" in manifest.warnings
    assert manifest.seconds > 0
    assert manifest.peak_memory_bytes > 0


def test_the_estimated_size_is_the_size(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(dtype=torch.bfloat16, hidden_size=256, intermediate_size=1024, head_dim=64)
    for preset in ("fp8", "int4"):
        plan = plan_quantize(source, preset)
        made = quantize(source, preset, tmp_path / preset)
        assert plan.output_bytes == pytest.approx(made.disk_bytes, rel=0.02)
        assert plan.output_config == made.config
        assert made.manifest is not None
        assert made.manifest.key == plan.key


def test_equal_inputs_give_equal_files(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    first, second = (quantize(source, "fp8", tmp_path / name) for name in ("a", "b"))
    assert first.hash == second.hash


def test_embeddings_head_and_norms_are_untouched(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(tie_word_embeddings=False)
    made = quantize(source, "int8", tmp_path / "out")
    before = load_file(source.folder / "model.safetensors")
    after = load_file(made.folder / "model.safetensors")
    for name in before:
        if "_proj" not in name:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "int5"}, "preset 'int5' is not known"),
        (
            {"preset": "int4"},
            "128 does not divide the 64 input columns .* Sizes that do: 16, 32, 64",
        ),
        ({"preset": "int4", "group_size": 48}, "48 does not divide"),
        (
            {"preset": "fp8", "ignore": ("*.q",)},
            r"matches no layer\. Names look like model\.layers",
        ),
        ({"preset": "fp8", "ignore": ("*",)}, "leaves no layer to quantize"),
    ],
)
def test_bad_input_is_found_before_any_work(
    tiny: Tiny, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        quantize(tiny(), out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(tiny(), "fp8", tmp_path / "one")
    with pytest.raises(SchemeError, match="is quantized already"):
        quantize(made, "int8", tmp_path / "two")


def test_an_existing_output_is_refused(tiny: Tiny) -> None:
    source = tiny()
    with pytest.raises(OutputError, match="exists"):
        quantize(source, "fp8", source.folder)
