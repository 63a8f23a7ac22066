"""Our decoder's logits against transformers', on every family and every kind of checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from tests.conftest import FAMILIES, VOCAB, quantize_tiny
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.device import bf16_products
from tinier.engine import load_decoder
from tinier.schemes import PRESETS as ALL_PRESETS

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")
PRESETS = [None, "fp8", "int8", "int4"]


def logits_of_both(checkpoint: Checkpoint, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.randint(0, VOCAB - 4, (3, length), generator=torch.Generator().manual_seed(5))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=checkpoint.dtype).eval()
    with torch.no_grad(), bf16_products(CPU):  # equal arithmetic, as nearly as can be
        theirs = model(windows).logits
    decoder = load_decoder(checkpoint, device=CPU)
    return decoder.logits(decoder.hidden_states(windows)), theirs


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.usefixtures("floating_int8")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_in_float32(
    tiny: Tiny, tmp_path: Path, family: str, preset: str | None
) -> None:
    checkpoint = tiny(family)
    if preset:
        checkpoint = quantize_tiny(checkpoint, preset, tmp_path / "q")
    assert distance(*logits_of_both(checkpoint)) < 1e-5


@pytest.mark.usefixtures("floating_int8")
@pytest.mark.parametrize("preset", sorted(set(ALL_PRESETS) - set(PRESETS[1:]) | {"mixed", "null"}))
def test_logits_of_every_preset_agree_in_float32(tiny: Tiny, tmp_path: Path, preset: str) -> None:
    # compressed-tensors unpacks FP4 to bf16 only
    dtype = torch.bfloat16 if "fp4" in preset else torch.float32
    source = tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=2, dtype=dtype)
    bits = {"bits": 6.0} if preset == "mixed" else {}
    asked = None if preset == "null" else preset
    checkpoint = quantize_tiny(source, asked, tmp_path / "q", **bits)
    ours, theirs = logits_of_both(checkpoint)
    if preset in ("nvfp4", "mxfp4"):  # activations on a grid this coarse magnify bf16's last bit
        _, dense = logits_of_both(source)
        assert distance(ours, dense) < 1.1 * distance(theirs, dense)
        assert distance(ours, theirs) < distance(theirs, dense)
    else:
        assert distance(ours, theirs) < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_zero_points_mean_what_compressed_tensors_says(tiny: Tiny, tmp_path: Path) -> None:
    # transformers 5.23 cannot load them, so its dense model gets the package's decompressed weights
    source = tiny()
    checkpoint = quantize_tiny(source, "int4-awq", tmp_path / "q", symmetric=False)
    block = QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
    scheme = block.config_groups["group_0"]
    with checkpoint.reader() as read:
        stored = {name: read(name) for name in checkpoint.tensors}
    dense = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    weights = {n: t for n, t in stored.items() if n in dense.state_dict()}
    for name in {n.removesuffix(".weight_packed") for n in stored if n.endswith(".weight_packed")}:
        parts = {
            n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.")
        }
        weights[f"{name}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    dense.load_state_dict(weights, strict=False)
    windows = torch.randint(0, VOCAB - 4, (3, 40), generator=torch.Generator().manual_seed(5))
    decoder = load_decoder(checkpoint, device=CPU)
    ours = decoder.logits(decoder.hidden_states(windows))
    with torch.no_grad():
        assert distance(ours, dense(windows).logits) < 1e-5


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_a_quantized_head_and_cache(
    tiny: Tiny, tmp_path: Path, family: str, kind: str
) -> None:
    for name, options in {"head": {"head": kind}, "kv": {"kv": kind}}.items():
        checkpoint = quantize_tiny(tiny(family), "int4", tmp_path / name, **options)
        assert distance(*logits_of_both(checkpoint)) < (1e-5 if kind == "fp8" else 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_in_integers_stays_within_its_own_rounding(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    checkpoint = tiny(family)
    _, dense = logits_of_both(checkpoint)
    ours, theirs = logits_of_both(quantize_tiny(checkpoint, "int8", tmp_path / "q"))
    assert distance(ours, dense) < 1.1 * distance(theirs, dense)
    assert distance(ours, theirs) < 0.5 * distance(theirs, dense)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_in_bfloat16(
    tiny: Tiny, tmp_path: Path, family: str, preset: str | None
) -> None:
    checkpoint = tiny(family, dtype=torch.bfloat16)
    if preset is None:
        assert distance(*logits_of_both(checkpoint)) < 0.01
        return
    _, dense = logits_of_both(checkpoint)
    ours, theirs = logits_of_both(quantize_tiny(checkpoint, preset, tmp_path / "q"))
    if preset == "int4":
        assert distance(ours, theirs) < 0.03
    # transformers computes the scales of 8-bit activations in bf16, the engine (as vLLM) in float32:
    # other codes, but as near to the 16-bit model, and no farther from each other than two
    # independent roundings of it, √2 times as far
    assert distance(ours, dense) < 1.1 * distance(theirs, dense)
    assert distance(ours, theirs) < 1.42 * distance(theirs, dense)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 24}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ],
)  # fmt: skip
def test_logits_agree_for_the_options_of_the_families(
    tiny: Tiny, family: str, overrides: dict[str, object]
) -> None:
    assert distance(*logits_of_both(tiny(family, **overrides))) < 1e-5


@pytest.mark.usefixtures("floating_int8")
@pytest.mark.parametrize("preset", ["fp8", "int8", "int4"])
@pytest.mark.parametrize(
    "ignore", [("*.down_proj", "*.0.self_attn.*"), ("*.q_proj", "*.up_proj"), ("*.v_proj",)]
)
def test_layers_left_in_16_bit_stay_so(
    tiny: Tiny, tmp_path: Path, preset: str, ignore: tuple[str, ...]
) -> None:
    checkpoint = quantize_tiny(tiny(), preset, tmp_path / "q", ignore=ignore)
    assert distance(*logits_of_both(checkpoint)) < 1e-5


def test_weight_bytes_count_a_tied_head_once(tiny: Tiny) -> None:
    checkpoint = tiny()
    assert load_decoder(checkpoint, device=CPU).weight_bytes < checkpoint.weight_bytes
    assert load_decoder(checkpoint, device=CPU).weight_bytes > 0.98 * checkpoint.weight_bytes
