"""Exports hold the numbers of their source in other tensors, or are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import quantize_tiny
from torch import Tensor

from tinier.checkpoint import Checkpoint, read_json, unpack_linear
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.errors import CheckpointError, InputError, MeasuredFailure, SchemeError
from tinier.exporting import TARGETS, export, plan_export, suited
from tinier.families import checkpoint_layout, geometry_of, open_model
from tinier.kernels import static_scale
from tinier.numerics import dequantize
from tinier.quantization import QuantizePlan, quantize
from tinier.quantization.scales import absmax_scales
from tinier.schemes import PRESETS

Tiny = Callable[..., Checkpoint]
EXACT = [
    ("gptq", "int4-gptq"), ("gptq", "int2"), ("gptq-v2", "int4"), ("awq", "int4"), ("awq", "int4-awq"),
    ("fp8-hf", "fp8-block"), ("tensorrt-llm", "fp8"), ("tensorrt-llm", "fp8-static"),
    ("tensorrt-llm", "fp8-block"), ("tensorrt-llm", "nvfp4"), ("tensorrt-llm", "int4-awq"),
    ("vllm", "int8"), ("transformers", "int4"), ("sglang", "fp8"),
]  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4}


def weights(model: Checkpoint) -> dict[str, Tensor]:
    """Every linear layer's weight in float32, whatever it is stored as."""
    layout = checkpoint_layout(model)
    assert layout is not None
    with model.reader() as read:
        found = {
            name: unpack_linear(model.optional(read), name, scheme, layout.storage)[0]
            for name, scheme in layout.schemes.items()
            if name != "lm_head" or not geometry_of(model).tied_head
        }
    return {name: dequantize(codes, torch.float32) for name, codes in found.items()}


def quantized(tiny: Tiny, preset: str, out: Path, **plan: Any) -> Checkpoint:
    sizes = WIDE | {"num_key_value_heads": 2} if "block" in preset else {}
    plan = ({"group_size": 128} if "block" in preset else {}) | plan
    return open_model(
        quantize_tiny(tiny(dtype=torch.bfloat16, **sizes), preset, out, **plan).folder
    )


def exported(source: Checkpoint, to: str, out: Path) -> Checkpoint:
    export(source, to, out)
    return open_model(out)


@pytest.mark.parametrize(("to", "preset"), EXACT)
def test_what_is_exported_is_the_same_model(
    tiny: Tiny, tmp_path: Path, to: str, preset: str
) -> None:
    source = quantized(tiny, preset, tmp_path / "source")
    made = exported(source, to, tmp_path / "made")
    assert made.manifest is not None
    assert made.manifest.measures["kl"] <= 1e-6
    ours, theirs = weights(source), weights(made)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    prompts, params = [[1, 2, 3], [7]], SamplingParams(max_tokens=4)
    engine = Engine(made, EngineConfig(device="cpu", max_seq_len=32))
    assert len(engine.generate(prompts, params)) == 2


@pytest.mark.parametrize(
    ("to", "preset"), [pair for pair in EXACT if TARGETS[pair[0]].storage != "compressed-tensors"]
)
def test_what_was_exported_is_imported(tiny: Tiny, tmp_path: Path, to: str, preset: str) -> None:
    """And goes on to other targets: the numbers are the same all the way."""
    source = quantized(tiny, preset, tmp_path / "source")
    foreign = exported(source, to, tmp_path / "foreign")
    back = exported(foreign, "tinier", tmp_path / "back")
    layout = checkpoint_layout(back)
    assert layout is not None
    assert layout.storage == "compressed-tensors"
    theirs = weights(back)
    for name, weight in weights(source).items():
        assert torch.equal(weight, theirs[name]), name
    if preset.startswith("int4"):
        export(foreign, "gguf", tmp_path / "gguf")


def test_global_scales_survive_being_inverted() -> None:
    """ModelOpt's layout has their inverse: the scale that comes back must be the same, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    grid = PRESETS["nvfp4"].scheme.weights
    for _ in range(200):
        weight = torch.randn(16, 32, generator=generator)
        scale = absmax_scales(weight, grid, torch.bfloat16).global_scale
        assert scale is not None
        inputs = static_scale(weight.abs().max(), grid)
        for found in (scale, inputs):
            assert torch.equal(1 / (1 / found), found)


def test_zero_points_go_to_awq(tiny: Tiny, tmp_path: Path) -> None:
    source = quantized(tiny, "int4", tmp_path / "source", symmetric=False)
    made = exported(source, "awq", tmp_path / "made")
    theirs = weights(made)
    for name, weight in weights(source).items():
        assert torch.equal(weight, theirs[name]), name
    with pytest.raises(SchemeError, match="without zero points"):
        plan_export(source, "gptq")


def test_a_cache_in_fp8_goes_to_tensorrt(tiny: Tiny, tmp_path: Path) -> None:
    source = quantized(tiny, "fp8", tmp_path / "source", kv="fp8")
    made = exported(source, "tensorrt-llm", tmp_path / "made")
    assert "model.layers.0.self_attn.k_proj.k_scale" in load_file(
        min(made.folder.glob("*.safetensors"))
    )
    told = read_json(made.folder / "hf_quant_config.json")["quantization"]
    assert told["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert told["kv_cache_quant_algo"] == "FP8"
    assert told["exclude_modules"] == ["lm_head"]
    assert "dtype: fp8" in (made.folder / "options.yaml").read_text()
    # ModelOpt before 0.44 wrote no quantization_config into config.json
    config = json.loads((made.folder / "config.json").read_text())
    del config["quantization_config"]
    (made.folder / "config.json").write_text(json.dumps(config))
    layout = checkpoint_layout(open_model(made.folder))
    assert layout is not None
    assert layout == checkpoint_layout(made)


def test_a_model_without_a_tokenizer_is_compared_on_any_tokens(tiny: Tiny, tmp_path: Path) -> None:
    source = quantized(tiny, "int4", tmp_path / "source")
    for path in source.folder.glob("tokenizer*"):
        path.unlink()
    assert export(source, "gptq", tmp_path / "made").measures["kl"] <= 1e-6


def test_16_bit_models_go_where_they_are_read(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(dtype=torch.bfloat16)
    made = exported(source, "tensorrt-llm", tmp_path / "made")
    assert "quantization_config" not in made.config
    with pytest.raises(SchemeError, match="Quantize it first"):
        plan_export(source, "gptq")


@pytest.mark.parametrize(
    ("to", "preset", "options", "message"),
    [
        ("gptq", "fp8", {}, "Quantize with int4"),
        ("gptq", "int4", {"head": "int8"}, "all its layers in one format"),
        ("gptq", "int4", {"embedding": "int8"}, "all its layers in one format"),
        ("awq", "int8", {}, "Quantize with int4-awq"),
        ("fp8-hf", "fp8", {}, "Quantize with fp8-block"),
        ("tensorrt-llm", "int8", {}, "reads INT8 with a scale a row as FP8"),
        ("tensorrt-llm", "int3", {}, "no word for"),
        ("tensorrt-llm", "fp8", {"kv": "int8"}, "--kv fp8"),
        ("vllm", "int8", {"embedding": "int8"}, "--embedding 16bit"),
        ("vllm", "fp8-e5m2", {}, "reads all 8-bit floats as E4M3"),
        ("vllm", "int4", {"ignore": ("*.q_proj",)}, "are one matrix there"),
        ("transformers", "int4", {"embedding": "int4"}, "no packed embedding"),
        ("transformers", "int4", {"symmetric": False}, "zero points"),
    ],
)
def test_what_a_target_cannot_read_is_refused(
    tiny: Tiny, tmp_path: Path, to: str, preset: str, options: dict[str, Any], message: str
) -> None:
    source = quantized(tiny, preset, tmp_path / "source", **options)
    with pytest.raises(SchemeError, match=message):
        export(source, to, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_quantization_for_a_target_fits_it(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(dtype=torch.bfloat16)
    plan = suited(source, QuantizePlan(preset="int4"), "gguf")
    assert plan.group_size == 32
    export(quantize(source, plan, tmp_path / "made", device="cpu"), "gguf", tmp_path / "gguf")
    assert suited(source, replace(plan, group_size=64), "gguf").group_size == 64
    assert suited(source, QuantizePlan(preset="int8"), "gguf").group_size is None
    with pytest.raises(SchemeError, match="no type for the numbers of FP8"):
        suited(source, QuantizePlan(preset="fp8"), "gguf")
    with pytest.raises(SchemeError, match="GPTQ"):
        suited(source, QuantizePlan(preset="fp8"), "gptq")
    with pytest.raises(SchemeError, match="E5M2"):
        suited(source, QuantizePlan(preset="fp8-e5m2"), "vllm")
    with pytest.raises(InputError, match="--for trt is not known"):
        suited(source, QuantizePlan(preset="fp8"), "trt")


def test_an_unknown_target_is_named(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=f"Targets: {', '.join(TARGETS)}"):
        plan_export(tiny(), "trt")


def test_an_export_that_is_another_model_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.exporting import driver

    plain = driver.pack_linear

    def wrong(codes, *rest):  # type: ignore[no-untyped-def]
        return plain(codes._replace(scale=codes.scale * 2), *rest)

    monkeypatch.setattr(driver, "pack_linear", wrong)
    source = quantized(tiny, "int4", tmp_path / "source")
    with pytest.raises(MeasuredFailure, match="would be another model"):
        export(source, "gptq", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir() if "made" in path.name] == []


def test_a_stopped_export_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.exporting import driver

    source = quantized(tiny, "int4", tmp_path / "source")
    whole = exported(source, "gptq", tmp_path / "whole")
    packed: list[Tensor] = []
    plain = driver.pack_linear

    def stopped(codes, *rest):  # type: ignore[no-untyped-def]
        packed.append(codes.codes)
        if len(packed) == 10:  # in the second layer
            raise KeyboardInterrupt
        return plain(codes, *rest)

    monkeypatch.setattr(driver, "pack_linear", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(source, "gptq", tmp_path / "made")
    monkeypatch.undo()
    assert not (tmp_path / "made").exists()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".made*/*.safetensors")}
    assert len(before) == 1
    made = exported(source, "gptq", tmp_path / "made")
    assert made.hash == whole.hash
    after = {path.name: path.stat().st_mtime_ns for path in made.folder.glob("*.safetensors")}
    assert before.items() <= after.items()


def test_groups_in_another_order_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """GPTQ with desc_act: another multiplication."""
    made = exported(quantized(tiny, "int4", tmp_path / "source"), "gptq", tmp_path / "made")
    path = min(made.folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("g_idx"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="desc_act"):
        weights(open_model(made.folder))


def test_biases_of_zeros_are_none(tiny: Tiny, tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias."""
    made = exported(quantized(tiny, "int4", tmp_path / "source"), "gptq", tmp_path / "made")
    path = min(made.folder.glob("*.safetensors"))
    tensors = load_file(path)
    bias = "model.layers.0.mlp.down_proj.bias"
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    index["weight_map"][bias] = path.name
    (made.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for value, fits in ((0.0, True), (0.5, False)):
        tensors[bias] = torch.full((64,), value, dtype=torch.bfloat16)
        save_file(tensors, path, metadata={"format": "pt"})
        if fits:
            assert bias not in open_model(made.folder).tensors
        else:
            with pytest.raises(CheckpointError, match="does not call for"):
                open_model(made.folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("to", "preset"),
    [("gptq", "int4"), ("awq", "int4"), ("tensorrt-llm", "fp8"), ("tensorrt-llm", "nvfp4"),
     ("fp8-hf", "fp8-block")],
)  # fmt: skip
def test_a_gpu_computes_exports_as_it_does_their_source(
    tiny: Tiny, tmp_path: Path, to: str, preset: str
) -> None:
    source = quantized(tiny, preset, tmp_path / "source")
    manifest = export(source, to, tmp_path / "made", device="cuda")
    assert manifest.measures["kl"] <= 1e-6
    texts = []
    for model in (source, open_model(tmp_path / "made")):
        engine = Engine(model, EngineConfig(device="cuda", max_seq_len=64))
        texts.append(engine.generate([[1, 2, 3], [7] * 20], SamplingParams(max_tokens=12)))
    # zero points of zero go another way, whose sums may differ in the last bit
    assert texts[0] == texts[1] or to == "awq"


@pytest.mark.parametrize(
    ("preset", "plan"),
    [("int4", {}), ("int4", {"symmetric": False, "embedding": "int8"}), ("fp8", {"kv": "fp8"}),
     ("fp8-block", {}), ("nvfp4", {}), ("int8", {"head": "int8"})],
)  # fmt: skip
def test_codes_become_numbers_again(
    tiny: Tiny, tmp_path: Path, preset: str, plan: dict[str, Any]
) -> None:
    source = quantized(tiny, preset, tmp_path / "q", **plan)
    made = exported(source, "16bit", tmp_path / "made")
    assert checkpoint_layout(made) is None
    assert made.disk_bytes <= plan_export(source, "16bit").output_bytes * 1.05 + 20_000
    with made.reader() as read:
        for name, expected in weights(source).items():
            assert torch.equal(read(f"{name}.weight"), expected.to(torch.bfloat16)), name
    with pytest.raises(SchemeError, match="16 bit already"):
        plan_export(made, "16bit")


def test_a_model_repository_names_its_weights(tiny: Tiny, tmp_path: Path) -> None:
    source = quantized(tiny, "int4", tmp_path / "q")
    for to, file in (("triton-vllm", "model.json"), ("triton-tensorrt-llm", "model.yaml")):
        export(source, to, tmp_path / to)
        model = tmp_path / to / "model_repository" / to
        assert f"/models/{to}/1/weights" in (model / "1" / file).read_text()
        assert f'name: "{to}"' in (model / "config.pbtxt").read_text()
        made = open_model(model / "1" / "weights")
        assert all(torch.equal(x, weights(made)[name]) for name, x in weights(source).items())
        assert not list((tmp_path / to).rglob(".*"))
        assert "model_repository:/models" in (tmp_path / to / "serve.txt").read_text()
    assert (model / "1" / "weights" / "hf_quant_config.json").exists()
