import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.calibration import walk
from tinier.checkpoint import Checkpoint
from tinier.errors import TextError

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_flows_is_what_flows_in_the_whole_model(
    tiny: Callable[..., Checkpoint], family: str
) -> None:
    checkpoint = tiny(family)
    windows = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    steps = list(walk(checkpoint, windows, device=CPU, label="walk"))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, state in zip(steps, states, strict=False):
        assert torch.allclose(step.inputs, state, atol=1e-5)
    assert torch.allclose(model.model.norm(steps[-1].outputs), states[-1], atol=1e-5)


def test_only_one_layer_is_loaded_at_a_time(tiny: Callable[..., Checkpoint]) -> None:
    windows = torch.zeros(1, 8, dtype=torch.int64)
    modules = []
    for step in walk(tiny(), windows, device=CPU, label="walk"):
        assert all(p.device.type == "cpu" for p in step.module.parameters())
        assert all(earlier() is None for earlier in modules)
        modules.append(weakref.ref(step.module))
        del step
        gc.collect()


def test_windows_longer_than_sliding_attention_are_refused(
    tiny: Callable[..., Checkpoint],
) -> None:
    checkpoint = tiny("mistral", sliding_window=8)
    with pytest.raises(TextError, match="windows of 16 tokens exceed sliding attention of 8"):
        next(walk(checkpoint, torch.zeros(1, 16, dtype=torch.int64), device=CPU, label="walk"))
