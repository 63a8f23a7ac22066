from collections.abc import Callable

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.families import FAMILIES as ROWS
from tinier.families import geometry_of

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
    assert stored == linears | set(geometry.norms) | set(geometry.biases)


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
