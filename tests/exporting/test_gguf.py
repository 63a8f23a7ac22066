"""GGUF files hold the codes of their source: read back by the `gguf` package, and by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tests.conftest import quantize_tiny

from tinier.checkpoint import Checkpoint
from tinier.engine.decoder import load_decoder
from tinier.errors import CheckpointError, SchemeError
from tinier.exporting import export, plan_export
from tinier.families import open_model
from tinier.tokenizer import load_tokenizer

Tiny = Callable[..., Checkpoint]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite")


def read(folder: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(folder / "model.gguf")


@pytest.mark.parametrize(
    ("preset", "options", "kind"),
    [
        ("int4", {}, Type.Q4_0),
        ("int4", {"group_size": 64}, Type.Q4_0),
        ("int4", {"symmetric": False}, Type.Q4_1),
        ("int8", {}, Type.Q8_0),
        ("mxfp4-w4a16", {}, Type.MXFP4),
        ("nvfp4-w4a16", {}, Type.NVFP4),
        (None, {}, Type.BF16),
    ],
)
def test_codes_are_carried_over(
    tiny: Tiny, tmp_path: Path, preset: str | None, options: dict[str, Any], kind: Type
) -> None:
    source = tiny(dtype=torch.bfloat16)
    if preset is not None:
        source = open_model(quantize_tiny(source, preset, tmp_path / "source", **options).folder)
    manifest = export(source, "gguf", tmp_path / "made")
    # a zero point times a scale is the one number that float16 may round
    limit = 1e-3 if options.get("symmetric") is False else 0
    assert manifest.measures["largest_difference"] <= limit
    tensors = {tensor.name: tensor for tensor in read(tmp_path / "made").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == kind
    assert tensors["token_embd.weight"].tensor_type == Type.BF16
    assert tensors["blk.0.attn_norm.weight"].tensor_type == Type.F32


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_embedding_is_stored_once(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    made = quantize_tiny(tiny(dtype=torch.bfloat16), "int4", tmp_path / "source", embedding=kind)
    export(open_model(made.folder), "gguf", tmp_path / "made")
    tensors = {tensor.name: tensor for tensor in read(tmp_path / "made").tensors}
    assert tensors["token_embd.weight"].tensor_type == (Type.Q8_0 if kind == "int8" else Type.Q4_0)
    assert "output.weight" not in tensors


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_model_that_was_written(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    """By its own names, order of rows and meaning of the norms."""
    from transformers import AutoModelForCausalLM

    # it takes every Qwen3's heads to have 128 channels
    source = tiny(family, dtype=torch.bfloat16, **({"head_dim": 128} if family == "qwen3" else {}))
    export(source, "gguf", tmp_path / "made")
    windows = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    decoder = load_decoder(source, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        found = theirs(windows).logits
    assert torch.allclose(decoder.logits(decoder.hidden_states(windows)), found, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_tokens(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source = tiny(family, dtype=torch.bfloat16)
    export(source, "gguf", tmp_path / "made")
    fields = read(tmp_path / "made").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    tokenizer = load_tokenizer(source)
    assert len(tokens) == source.config["vocab_size"]
    for i in range(len(tokenizer)):
        assert tokens[i] == tokenizer.inner.convert_ids_to_tokens(i)
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("family", "preset", "options", "message"),
    [
        ("llama", "fp8", {}, "no type for the numbers of FP8"),
        ("llama", "int3", {}, "no type for the numbers of INT3"),
        ("llama", "int8", {"kv": "int8"}, "Quantize without --kv"),
        ("olmo2", None, {}, "tinier writes Llama"),
        ("gemma3", None, {}, "queries divided by the root"),
    ],
)
def test_what_llama_cpp_has_no_type_for_is_refused(
    tiny: Tiny,
    tmp_path: Path,
    family: str,
    preset: str | None,
    options: dict[str, Any],
    message: str,
) -> None:
    source = tiny(family, dtype=torch.bfloat16)
    if preset is not None:
        source = open_model(quantize_tiny(source, preset, tmp_path / "source", **options).folder)
    with pytest.raises(SchemeError, match=message):
        plan_export(source, "gguf")


def test_a_tokenizer_without_a_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(dtype=torch.bfloat16)
    (source.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no model of a tokenizer"):
        plan_export(source, "gguf")
    with pytest.raises(CheckpointError, match="has no model of a tokenizer"):
        export(source, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ollama_gets_a_modelfile(tiny: Tiny, tmp_path: Path) -> None:
    export(tiny(dtype=torch.bfloat16), "ollama", tmp_path / "made")
    assert (tmp_path / "made" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
