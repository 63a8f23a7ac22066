"""Quantization-aware training: what is trained is what is written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.distillation import DistillPlan, distill, plan_distill, student
from tinier.distillation.driver import check_written
from tinier.engine import load_decoder
from tinier.errors import MeasuredFailure, SchemeError
from tinier.quantization import QuantizePlan, quantize

Tiny = Callable[..., Checkpoint]
TEXT = [f"Line {i}: the sum of {i} and {i} is {2 * i}. " * 4 for i in range(60)]
HELD = [f"Line {i}: the product of {i} and 2 is {2 * i}. " * 4 for i in range(60, 80)]


def plan(preset: str, **options: Any) -> DistillPlan:
    grouped = preset.startswith(("int4", "int3", "w4a8"))
    grid = QuantizePlan(
        preset=preset, group_size=32 if grouped else None, windows=8, length=32, iterations=2
    )
    sizes: dict[str, Any] = {
        "steps": 12, "batch": 4, "micro_batch": 2, "length": 32, "lr": 1e-3, "min_lr": 1e-4,
        "warmup_steps": 2, "precision": "float32",
    }  # fmt: skip
    return DistillPlan(quantize=grid, **(sizes | options))


def run(model: Checkpoint, asked: DistillPlan, out: Path) -> Checkpoint:
    return distill(model, model, asked, out, text=TEXT, heldout=HELD, device="cpu")


def kl(made: Checkpoint, when: str) -> float:
    assert made.manifest is not None
    found: float = made.manifest.measures[f"heldout_kl_{when}"]
    return found


@pytest.mark.parametrize(
    "preset",
    [
        "int4-awq",
        "fp8",
        "nvfp4",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("int4", "int8-sq", "mxfp4", "w4a8-int8", "int4-best")
        ),
    ],
)
def test_the_checkpoint_is_the_model_that_was_trained(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """transformers' logits of the written checkpoint against those of the module in training."""
    source = tiny()
    windows = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    original = student.export

    def watched(origin: Checkpoint, model: Any, grids: Any, state: Any) -> Any:
        with torch.no_grad():
            hidden, _ = student.hidden_states(model, windows, torch.float32)
            seen.append(hidden @ model.lm_head.weight.t())
        return original(origin, model, grids, state)

    monkeypatch.setattr("tinier.distillation.driver.export", watched)
    # INT8 has next to nothing to gain: the last step counts as the best, whatever it is
    falling = iter((2.0, 1.0))
    monkeypatch.setattr("tinier.distillation.trainer.Trainer.divergence", lambda _: next(falling))
    monkeypatch.setattr("tinier.distillation.driver.check_written", lambda *_: None)
    made = run(source, plan(preset, eval_every=12), tmp_path / "out")
    assert "quantization_config" in made.config
    if preset in ("nvfp4", "mxfp4"):  # transformers unpacks them to bf16 whatever is asked
        decoder = load_decoder(made, device=torch.device("cpu"), dtype=torch.float32)
        logits = decoder.logits(decoder.hidden_states(windows))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = loaded(windows).logits
    assert torch.allclose(logits, seen[-1], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_a_grid(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source = tiny(family, dtype=torch.bfloat16)
    made = run(source, plan("int4"), tmp_path / "out")
    assert kl(made, "after") < kl(made, "before")
    assert {n: (i.dtype, i.shape) for n, i in made.tensors.items()} == {
        n: (i.dtype, i.shape)
        for n, i in quantize(
            source, plan("int4").quantize, tmp_path / "q", text=TEXT, device="cpu"  # type: ignore[arg-type]
        ).tensors.items()
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["int4-gptq", "int4-awq", "fp8", "nvfp4"])
def test_training_that_moves_nothing_writes_the_quantized_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    source = tiny(dtype=torch.bfloat16)
    asked = plan(preset, steps=3, lr=0.0, min_lr=0.0, eval_every=3)
    falling = iter((2.0, 1.0))
    monkeypatch.setattr("tinier.distillation.trainer.Trainer.divergence", lambda _: next(falling))
    monkeypatch.setattr("tinier.distillation.driver.check_written", lambda *_: None)
    made = run(source, asked, tmp_path / "out")
    assert asked.quantize is not None
    plain = quantize(source, asked.quantize, tmp_path / "q", text=TEXT, device="cpu")
    with made.reader() as new, plain.reader() as old:
        assert made.tensors.keys() == plain.tensors.keys()
        for name in made.tensors:
            assert torch.equal(_values(new(name)), _values(old(name))), name


def _values(stored: torch.Tensor) -> torch.Tensor:
    """Packed FP4 as its codes, with one zero for both signs; everything else as it is."""
    if stored.dtype != torch.uint8:
        return stored.float()
    codes = torch.stack((stored & 15, stored >> 4))
    return torch.where(codes == 8, 0, codes)


def test_norms_and_scales_alone(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    made = run(source, plan("int4-gptq", train="norms", lr=3e-3), tmp_path / "out")
    assert kl(made, "after") < kl(made, "before")
    asked = plan("int4-gptq").quantize
    assert asked is not None
    plain = quantize(source, asked, tmp_path / "q", text=TEXT, device="cpu")
    with made.reader() as new, plain.reader() as old:
        same = {n for n in made.tensors if torch.equal(new(n), old(n))}
    assert {n for n in made.tensors if n.endswith("weight_packed")} <= same
    assert not {n for n in made.tensors if n.endswith("weight_scale")} & same


def test_bad_grids_are_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    grid = QuantizePlan(preset="int4", group_size=48)
    with pytest.raises(SchemeError, match="group size 48 does not divide"):
        plan_distill(source, source, DistillPlan(length=32, quantize=grid), TEXT, HELD)
    small = quantize(source, QuantizePlan(preset="fp8"), tmp_path / "q")
    with pytest.raises(SchemeError, match="train a 16-bit student on a grid: --quantize"):
        plan_distill(small, source, DistillPlan(length=32), TEXT, HELD)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "ends",
    [
        {"head": "int8", "kv": "fp8"},
        {"embedding": "int8"},
        *(
            pytest.param(ends, marks=pytest.mark.slow)
            for ends in (
                {"head": "fp8"},
                {"kv": "int8"},
                {"embedding": "fp8"},
                {"embedding": "int4"},
            )
        ),
    ],
)
def test_what_lies_around_the_layers_is_trained_with_as_it_is_written(
    tiny: Tiny, tmp_path: Path, ends: dict[str, Any], tied: bool
) -> None:
    """The written checkpoint, as the engine runs it, has the loss that training measured; and head and
    embedding keep the codes that they were given."""
    source = tiny(tie_word_embeddings=tied, dtype=torch.bfloat16)
    asked = plan("int4", lr=3e-4)
    assert asked.quantize is not None
    grid = replace(asked.quantize, **ends)
    made = run(source, replace(asked, quantize=grid), tmp_path / "out")
    assert kl(made, "after") < kl(made, "before")
    assert kl(made, "written") == pytest.approx(kl(made, "after"), rel=0.03)
    plain = quantize(source, grid, tmp_path / "q", text=TEXT, device="cpu")
    assert made.tensors.keys() == plain.tensors.keys()
    with made.reader() as new, plain.reader() as old:
        same = [n for n in made.tensors if "lm_head" in n or "embed" in n or n.endswith("v_scale")]
        for name in same:
            assert torch.equal(new(name).float(), old(name).float()), name


def test_a_checkpoint_that_is_not_the_trained_model_is_a_failure() -> None:
    check_written(0.101, 0.1)
    check_written(0.0, 0.019)
    for written in (0.5, float("nan")):
        with pytest.raises(MeasuredFailure, match="not the same model"):
            check_written(written, 0.1)


@pytest.mark.slow
def test_a_wider_vocabulary_learns_from_a_narrower_one(tiny: Tiny, tmp_path: Path) -> None:
    """Padded to different sizes, one tokenizer: what both know is trained, either way round."""
    narrow, wide = tiny(), tiny(name="wide", vocab_size=320, seed=1)
    sizes: dict[str, Any] = {"steps": 12, "batch": 4, "micro_batch": 2, "length": 32, "lr": 3e-3,
                             "min_lr": 1e-3, "warmup_steps": 2, "precision": "float32"}  # fmt: skip
    for top_k in (None, 8):
        for small, large in ((narrow, wide), (wide, narrow)):
            out = tmp_path / f"{small.folder.name}-{top_k}"
            made = distill(
                small, large, DistillPlan(top_k=top_k, **sizes), out, text=TEXT, heldout=HELD,
                device="cpu",
            )  # fmt: skip
            assert kl(made, "after") < kl(made, "before")
