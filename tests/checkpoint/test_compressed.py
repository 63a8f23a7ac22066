"""Our codes in compressed-tensors' layout, read back by that package's own code."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from tinier.checkpoint import pack_linear, quantization_config, scheme_of
from tinier.errors import CheckpointError
from tinier.numerics import dequantize
from tinier.quantization.rtn import rtn
from tinier.schemes import PRESETS, preset_named


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("columns", [128, 384])
def test_the_package_decompresses_to_our_values(preset: str, columns: int) -> None:
    scheme = PRESETS[preset].scheme
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized = rtn(weight, scheme.weights, torch.bfloat16)
    config = QuantizationConfig.model_validate(quantization_config(scheme, ["lm_head"]))
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    restored = compressor.decompress(pack_linear(quantized, scheme), group)["weight"]
    assert torch.equal(restored, dequantize(quantized, torch.bfloat16))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_scheme_survives_the_configuration_file(preset: str) -> None:
    scheme = preset_named(preset).scheme
    assert scheme_of({"quantization_config": quantization_config(scheme, [])}) == scheme
    assert scheme_of({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetric": False}, "symmetric=False"),
        ({"num_bits": 3}, "num_bits=3"),
        ({"strategy": "block"}, "strategy='block'"),
        ({"actorder": "group"}, "actorder='group'"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(change: dict[str, object], message: str) -> None:
    config = quantization_config(PRESETS["int4"].scheme, [])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(CheckpointError, match=message):
        scheme_of({"quantization_config": config})
