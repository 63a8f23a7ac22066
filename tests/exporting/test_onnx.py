"""ONNX Runtime computes what the checkpoint says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import quantize_tiny

from tinier.checkpoint import Checkpoint
from tinier.errors import InputError, MeasuredFailure, SchemeError
from tinier.exporting import export, onnx, plan_export

Tiny = Callable[..., Checkpoint]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "granite"]


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, marks=[] if family == "llama" else [pytest.mark.slow])
        for family in FAMILIES
        for tied in (True, False)
    ],
)
def test_a_graph_has_the_checkpoint_s_logits(
    tiny: Tiny, tmp_path: Path, family: str, tied: bool
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the extra onnx is not installed")
    source = quantize_tiny(
        tiny(family, dtype=torch.bfloat16, tie_word_embeddings=tied),
        "int4",
        tmp_path / "q",
        group_size=32,
    )
    manifest = export(source, "onnx", tmp_path / "made")
    assert manifest.measures["kl"] < 1e-6
    assert manifest.measures["top_1"] == 1
    assert not list((tmp_path / "made").glob(".*"))


def test_what_the_builder_does_not_take_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for family, preset, reason in (
        ("gemma3", "int4", "no graph of a Gemma3ForCausalLM"),
        ("llama", "int3", "4 bits"),
        ("llama", "fp8", "int4-gptq"),
    ):
        source = quantize_tiny(
            tiny(family, dtype=torch.bfloat16), preset, tmp_path / family / preset
        )
        with pytest.raises(SchemeError, match=reason):
            plan_export(source, "onnx")


def test_a_missing_builder_and_a_broken_one_leave_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantize_tiny(tiny(dtype=torch.bfloat16), "int4", tmp_path / "q", group_size=32)
    out = tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="onnxruntime_genai.* pip install"):
            export(source, "onnx", out)
        patch.setattr(onnx, "find_spec", lambda name: name)
        patch.setattr(onnx.sys, "executable", "false")  # type: ignore[attr-defined]
        with pytest.raises(MeasuredFailure, match="builder failed"):
            export(source, "onnx", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
