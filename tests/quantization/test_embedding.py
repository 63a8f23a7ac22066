"""Embeddings that are stored in 8 or 4 bits, alone or as one matrix with the head."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import quantize_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint, unpack_linear
from tinier.engine.decoder import load_decoder
from tinier.errors import CheckpointError, SchemeError
from tinier.families import EMBEDDING, EMBEDDING_MODULE, HEAD_LINEAR, checkpoint_layout, open_model
from tinier.numerics import dequantize
from tinier.quantization import QuantizePlan, plan_quantize

Tiny = Callable[..., Checkpoint]
KINDS = ("fp8", "int8", "int4")
CPU = torch.device("cpu")


def stored_rows(made: Checkpoint, name: str = EMBEDDING_MODULE) -> Tensor:
    """What the codes of the embedding stand for, in bf16."""
    layout = checkpoint_layout(made)
    assert layout is not None
    with made.reader() as read:
        codes, _ = unpack_linear(made.optional(read), name, layout.schemes[name])
    return dequantize(codes, torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_is_looked_up_as_it_is_stored(
    tiny: Tiny, tmp_path: Path, kind: str, tied: bool
) -> None:
    source = tiny(dtype=torch.bfloat16, tie_word_embeddings=tied)
    made = open_model(quantize_tiny(source, "int4", tmp_path / "out", embedding=kind).folder)
    rows = stored_rows(made)
    with source.reader() as read:
        plain = read(EMBEDDING)
    assert 0 < (rows - plain).norm() / plain.norm() < (0.12 if kind == "int4" else 0.04)
    decoder = load_decoder(made, device=CPU)
    tokens = torch.tensor([5, 0, 250, 5])
    assert torch.equal(decoder.embed(tokens), rows[tokens])
    label = {"fp8": "FP8", "int8": "INT8", "int4": "INT4 g32"}[kind]
    assert decoder.layout is not None
    assert f"{label} embedding{' and head' if tied else ''}" in decoder.layout.label
    # one matrix in memory, and as many bytes as its codes and scales have, sums of codes aside
    table = rows.numel() * (0.5 if kind == "int4" else 1)
    head = 0 if tied else rows.numel() * 2
    linears = sum(linear.num_bytes for layer in decoder.layers for linear in layer.linears)
    scales = decoder.embedding.num_bytes - table
    assert 0 < scales <= rows.numel() / 32 * 4
    assert decoder.weight_bytes == linears + table + scales + head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_transformers_computes_the_same(tiny: Tiny, tmp_path: Path, kind: str, tied: bool) -> None:
    source = tiny(dtype=torch.bfloat16, tie_word_embeddings=tied)
    made = quantize_tiny(source, "int4", tmp_path / "out", embedding=kind)
    loaded = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    windows = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    decoder = load_decoder(made, device=CPU, dtype=torch.float32)
    ours = decoder.logits(decoder.hidden_states(windows))
    with torch.no_grad():
        theirs = loaded(windows).logits
    assert torch.allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_refuses_packed_integers(tiny: Tiny, tmp_path: Path, tied: bool) -> None:
    """As the warning says; a head of random numbers would be worse."""
    source = tiny(dtype=torch.bfloat16, tie_word_embeddings=tied)
    asked = QuantizePlan(preset="int4", group_size=32, embedding="int4")
    assert any(
        "load" in w and "packed embedding" in w for w in plan_quantize(source, asked).warnings
    )
    made = quantize_tiny(source, "int4", tmp_path / "out", embedding="int4")
    with pytest.raises(AttributeError, match="no attribute .weight"):
        AutoModelForCausalLM.from_pretrained(made.folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_bytes(tiny: Tiny, tmp_path: Path, kind: str, tied: bool) -> None:
    source = tiny(dtype=torch.bfloat16, tie_word_embeddings=tied)
    planned, made = [], []
    for embedding in ("16bit", kind):
        asked = QuantizePlan(preset="int4", embedding=embedding, group_size=32)  # type: ignore[arg-type]
        planned.append(plan_quantize(source, asked).output_bytes)
        out = tmp_path / embedding
        made.append(quantize_tiny(source, "int4", out, embedding=embedding).weight_bytes)
    shape = 16 if kind == "int4" else 0  # weight_shape
    assert planned[0] - planned[1] == made[0] - made[1] + shape


def test_one_matrix_has_one_format(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(dtype=torch.bfloat16)
    with pytest.raises(SchemeError, match="Leave --head out"):
        plan_quantize(source, QuantizePlan(preset="fp8", embedding="int8", head="fp8"))
    with pytest.raises(SchemeError, match="embedding='int3'. Use 16bit, fp8, int8, int4"):
        QuantizePlan(preset="fp8", embedding="int3")  # type: ignore[arg-type]
    untied = tiny(name="untied", dtype=torch.bfloat16, tie_word_embeddings=False)
    plan_quantize(untied, QuantizePlan(preset="fp8", embedding="int8", head="fp8"))


def test_a_tied_head_with_other_numbers_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(dtype=torch.bfloat16), "fp8", tmp_path / "out", embedding="int8")
    path = max(made.folder.glob("*.safetensors"))  # what is around the layers
    tensors = load_file(path)
    tensors[f"{HEAD_LINEAR}.weight_scale"] *= 2
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match="ties its head to its embedding, and their scales differ"
    ):
        open_model(made.folder)
