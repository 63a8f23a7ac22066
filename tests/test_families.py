import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import DOCUMENTS, FAMILIES, VOCAB, byte_tokenizer, quantize_tiny, write_tiny
from tests.engine.test_decoder import distance, logits_of_both
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MinistralConfig,
    MinistralForCausalLM,
)

from tinier.checkpoint import Checkpoint
from tinier.engine import load_decoder
from tinier.families import FAMILIES as ROWS
from tinier.families import Family, geometry_of, hf_config, open_model, resolved_config
from tinier.pruning import PrunePlan, prune

Tiny = Callable[..., Checkpoint]


def test_every_row_is_tested() -> None:
    assert {model.__name__ for _, model in FAMILIES.values()} == set(ROWS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_transformers_does(tiny: Tiny, family: str, tied: bool) -> None:
    checkpoint = tiny(family, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert geometry_of(checkpoint).parameters == model.num_parameters()
    assert geometry_of(checkpoint).tied_head is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_tensors_are_exactly_the_stored_ones(tiny: Tiny, family: str) -> None:
    checkpoint = tiny(family)
    geometry = geometry_of(checkpoint)
    prefix = "model.layers.0."
    stored = {n.removeprefix(prefix) for n in checkpoint.tensors if n.startswith(prefix)}
    linears = {f"{name}.weight" for name in geometry.linears}
    routers = {f"{geometry.router}.weight"} if geometry.router else set()
    assert stored == linears | routers | set(geometry.norms) | set(geometry.biases)


def test_a_family_without_a_new_operator_is_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one of ours: transformers' Ministral, windows in some layers. Nothing else is said of it."""
    row = Family(
        architecture="MinistralForCausalLM", qkv_bias=False, mlp_bias=False, windows="layer_types"
    )
    monkeypatch.setitem(ROWS, row.architecture, row)
    monkeypatch.setitem(FAMILIES, "ministral", (MinistralConfig, MinistralForCausalLM))
    kinds = ["sliding_attention", "full_attention"] * 2
    source = write_tiny(
        tmp_path / "tiny", "ministral", dtype=torch.float32, sliding_window=16, layer_types=kinds
    )
    assert geometry_of(source).windows == (16, None, 16, None)
    assert distance(*logits_of_both(source)) < 1e-5
    plan = PrunePlan(drop_layers=(1,), keep_intermediate=64, refit=False, windows=2, length=16)
    pruned = prune(source, plan, tmp_path / "pruned", text=DOCUMENTS)
    made = quantize_tiny(pruned, "fp8", tmp_path / "fp8")
    assert geometry_of(made).windows == (16, 16, None)
    assert distance(*logits_of_both(made)) < 1e-5


def test_the_language_model_of_one_that_sees_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64,
        "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=1)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    model = open_model(tmp_path / "whole")
    assert any("its language model is taken" in note for note in model.notes)
    made = quantize_tiny(model, None, tmp_path / "text", head="fp8")
    windows = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    decoder = load_decoder(model, device=torch.device("cpu"))
    with torch.no_grad():
        expected = whole(input_ids=windows, token_type_ids=torch.zeros_like(windows)).logits
    assert distance(decoder.logits(decoder.hidden_states(windows)), expected) < 1e-5
    assert made.config["architectures"] == ["Gemma3ForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(made.folder) is not None


def test_llama_with_biases(tiny: Tiny) -> None:
    geometry = geometry_of(tiny("llama", attention_bias=True, mlp_bias=True))
    assert len(geometry.biases) == 7


def test_windows_of_the_families_that_have_them(tiny: Tiny) -> None:
    assert geometry_of(tiny("mistral", sliding_window=32)).windows == (32,) * 4
    checkpoint = tiny(
        "qwen2", name="q", use_sliding_window=True, sliding_window=16, max_window_layers=2
    )
    assert geometry_of(checkpoint).windows == (None, None, 16, 16)


def test_half_precision_is_stored_as_it_is(tiny: Tiny) -> None:
    assert tiny(dtype=torch.float16).tensors["model.norm.weight"].dtype == "F16"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_configuration_says_what_transformers_says(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    checkpoint = tiny(family)
    own, ours = vars(hf_config(checkpoint)), vars(resolved_config(checkpoint))
    for name, value in ours.items():
        if name in own and name not in ("dtype", "transformers_version"):
            assert json.loads(json.dumps(own[name])) == value, name
    first = geometry_of(checkpoint)
    monkeypatch.setattr("tinier.families.configuration.hf_config", None)  # it was kept
    assert geometry_of(checkpoint) == first
    # what cannot be kept is made each time
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "file"))
    assert geometry_of(checkpoint) == first
