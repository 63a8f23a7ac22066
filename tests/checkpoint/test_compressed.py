"""Our codes in compressed-tensors' layout, read back by that package's own code and by ours."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from tinier.checkpoint import (
    layout_of,
    pack_linear,
    quantization_config,
    stored_shapes,
    unpack_linear,
)
from tinier.errors import CheckpointError
from tinier.kernels import static_scale
from tinier.numerics import dequantize
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.schemes import PRESETS, Grid, Layout, Scheme, preset_named

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]
SCHEMES = {name: preset.scheme for name, preset in PRESETS.items()}
SCHEMES["int4-asym"] = preset_named("int4", symmetric=False).scheme
SCHEMES["int3-asym"] = preset_named("int3", symmetric=False).scheme


def packed(scheme: Scheme, columns: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight rounded to nearest, and its tensors."""
    weight = torch.randn(128, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = scheme.weights
    quantized = round_nearest(weight, absmax_scales(weight, grid, torch.bfloat16), grid)
    scale = None
    if scheme.activations and (
        scheme.static_activations or scheme.activations.scale_format == "e4m3"
    ):
        scale = static_scale(torch.tensor(3.0), scheme.activations)
    return dequantize(quantized, torch.bfloat16), pack_linear(quantized, scheme, scale)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [128, 384])
def test_the_package_decompresses_to_our_values(name: str, columns: int) -> None:
    scheme = SCHEMES[name]
    values, tensors = packed(scheme, columns)
    config = QuantizationConfig.model_validate(
        quantization_config(Layout(schemes={NAMES[0]: scheme}), NAMES)
    )
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    restored = compressor.decompress(dict(tensors), group)["weight"]
    # FP4 codes times scales are exact in float32 only; the package multiplies in 16 bit
    assert torch.allclose(restored.float(), values.float(), rtol=2**-7)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [128, 384])
def test_what_was_packed_is_unpacked(name: str, columns: int) -> None:
    scheme = SCHEMES[name]
    values, tensors = packed(scheme, columns)
    stored = {f"a.{part}": tensor for part, tensor in tensors.items()}
    quantized, input_scale = unpack_linear(stored.get, "a", scheme)
    assert torch.equal(dequantize(quantized, torch.bfloat16), values)
    assert (input_scale is None) == (not {"input_scale", "input_global_scale"} & set(tensors))
    shapes = {part: tuple(t.shape) for part, t in tensors.items() if part != "weight_shape"}
    assert stored_shapes(scheme, (128, columns)) == shapes


@pytest.mark.parametrize("name", SCHEMES)
def test_layout_survives_the_configuration_file(name: str) -> None:
    one = Layout(schemes={NAMES[1]: SCHEMES[name]})
    read = layout_of({"quantization_config": quantization_config(one, NAMES)}, NAMES)
    if name == "fp8-e5m2":  # the configuration has no word for it; the codes' type has
        assert packed(SCHEMES[name], 128)[1]["weight"].dtype == torch.float8_e5m2
        one = Layout(schemes={NAMES[1]: Scheme(weights=PRESETS["fp8"].scheme.weights)})
    assert read == one
    assert layout_of({}, NAMES) is None


def test_several_schemes_the_head_and_the_cache_survive_it() -> None:
    layout = Layout(
        schemes={NAMES[0]: SCHEMES["int4"], NAMES[1]: SCHEMES["fp8"], NAMES[2]: SCHEMES["fp8"]},
        kv_cache=Grid(kind="float", bits=8, granularity="tensor"),
    )
    block = quantization_config(layout, NAMES)
    assert block["format"] == "mixed-precision"
    assert layout_of({"quantization_config": block}, NAMES) == layout


def test_a_layer_s_name_goes_before_a_pattern_and_that_before_its_class() -> None:
    block = quantization_config(Layout(schemes={NAMES[0]: SCHEMES["fp8"]}), [])
    base = block["config_groups"]["group_0"]
    other = quantization_config(Layout(schemes={NAMES[0]: SCHEMES["int8"]}), [])
    block["config_groups"]["group_1"] = other["config_groups"]["group_0"] | {
        "targets": ["re:.*down_proj"]
    }
    base["targets"] = ["Linear"]
    read = layout_of({"quantization_config": block}, NAMES)
    assert read is not None
    assert read.schemes[NAMES[0]] == SCHEMES["fp8"]
    assert read.schemes[NAMES[1]] == SCHEMES["int8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 5}, "num_bits=5"),
        ({"strategy": "attn_head", "group_size": None}, "strategy='attn_head'"),
        ({"actorder": "group"}, "actorder='group'"),
        ({"dynamic": True}, "dynamic=True"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(change: dict[str, object], message: str) -> None:
    config = quantization_config(Layout(schemes={NAMES[0]: SCHEMES["int4"]}), [])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(CheckpointError, match=message):
        layout_of({"quantization_config": config}, NAMES)


def test_another_method_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quantized with 'bitsandbytes'"):
        layout_of({"quantization_config": {"quant_method": "bitsandbytes"}}, NAMES)


@pytest.mark.parametrize(
    "activations",
    [
        {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False},
        {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False},
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True},
    ],
)
def test_inputs_that_are_not_rounded_as_the_file_says_are_refused(
    activations: dict[str, object],
) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    block = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    with pytest.raises(CheckpointError, match="which this tinier cannot run"):
        layout_of({"quantization_config": block}, NAMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_preset_is_read_as_it_was_written(name: str) -> None:
    layout = Layout(schemes={NAMES[0]: SCHEMES[name]})
    block = quantization_config(layout, NAMES)
    found = layout_of({"quantization_config": block}, NAMES)
    assert found is not None
    # only the stored codes tell E5M2 from E4M3
    assert name == "fp8-e5m2" or found.schemes == layout.schemes


def test_weights_by_token_and_rotated_inputs_are_refused() -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights}
    block = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    with pytest.raises(CheckpointError, match="cannot run"):
        layout_of({"quantization_config": block}, NAMES)
    rotated = quantization_config(Layout(schemes={NAMES[0]: SCHEMES["fp8"]}), NAMES)
    rotated["transform_config"] = {"config_groups": {"R1": {}}}
    with pytest.raises(CheckpointError, match="transform_config"):
        layout_of({"quantization_config": rotated}, NAMES)
