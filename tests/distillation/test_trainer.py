import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import DEVICES

from tinier.checkpoint import Checkpoint
from tinier.distillation import DistillPlan, distill
from tinier.distillation.trainer import _batch_indices, learning_rate
from tinier.errors import InputError, MeasuredFailure, SchemeError, TextError
from tinier.families import geometry_of, open_model
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan, quantize

Tiny = Callable[..., Checkpoint]
TEXT = [f"Line {i}: the sum of {i} and {i} is {2 * i}. " * 4 for i in range(60)]
HELD = [f"Line {i}: the product of {i} and 2 is {2 * i}. " * 4 for i in range(60, 80)]
PLAN = DistillPlan(
    steps=8, batch=4, micro_batch=2, length=32, lr=3e-3, min_lr=1e-3, warmup_steps=2,
    save_seconds=1e9,
)  # fmt: skip


def pair(tiny: Tiny, tmp_path: Path, **overrides: object) -> tuple[Checkpoint, Checkpoint]:
    teacher = tiny(**overrides)
    return prune(teacher, PrunePlan(drop_layers=(2,)), tmp_path / "student"), teacher


@pytest.mark.parametrize("device", DEVICES)
def test_the_student_comes_nearer_to_the_teacher(tiny: Tiny, tmp_path: Path, device: str) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, steps=60)
    made = distill(
        student, teacher, plan, tmp_path / "out", documents=TEXT, heldout=HELD, device=device
    )
    assert made.manifest is not None
    measures = made.manifest.measures
    assert measures["heldout_kl_after"] < 0.6 * measures["heldout_kl_before"]
    assert len(measures["loss"]) == 60
    assert made.manifest.parents == {"source": student.hash, "teacher": teacher.hash}
    assert geometry_of(open_model(made.folder)).layers == 3
    assert {n: i.shape for n, i in made.tensors.items()} == {
        n: i.shape for n, i in student.tensors.items()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "student", "tiny"]


def test_types_of_the_checkpoint_stay(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path, dtype=torch.bfloat16, tie_word_embeddings=False)
    made = distill(
        student, teacher, PLAN, tmp_path / "out", documents=TEXT, heldout=HELD, device="cpu"
    )
    assert {info.dtype for info in made.tensors.values()} == {"BF16"}


def test_a_killed_run_goes_on_to_the_same_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.distillation import trainer

    student, teacher = pair(tiny, tmp_path)
    whole = distill(
        student, teacher, PLAN, tmp_path / "whole", documents=TEXT, heldout=HELD, device="cpu"
    )
    eager = dataclasses.replace(PLAN, save_seconds=0.0)
    original = trainer._Training._step
    steps = []

    def die_at_step_five(self: trainer._Training, step: int, batch: torch.Tensor) -> float:
        steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(self, step, batch)

    monkeypatch.setattr(trainer._Training, "_step", die_at_step_five)
    with pytest.raises(KeyboardInterrupt):
        distill(
            student, teacher, eager, tmp_path / "out", documents=TEXT, heldout=HELD, device="cpu"
        )
    assert not (tmp_path / "out").exists()
    resumed = distill(
        student, teacher, eager, tmp_path / "out", documents=TEXT, heldout=HELD, device="cpu"
    )
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    before = load_file(whole.folder / "model.safetensors")
    after = load_file(resumed.folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert whole.manifest is not None
    assert resumed.manifest is not None
    assert whole.manifest.measures["loss"] == resumed.manifest.measures["loss"]


def test_a_kill_while_saving_loses_one_save_only(tiny: Tiny, tmp_path: Path) -> None:
    from tinier.distillation import trainer

    student, teacher = pair(tiny, tmp_path)
    run = trainer._Training(student, teacher, PLAN, torch.device("cpu"), tmp_path / "work", "key")
    run._save([1.0, 2.0])
    # what a kill leaves: an unfinished save, and an older one whose removal had begun
    (tmp_path / "work" / "unfinished").mkdir()
    (tmp_path / "work" / "step-000001").mkdir()
    again = trainer._Training(student, teacher, PLAN, torch.device("cpu"), tmp_path / "work", "key")
    assert again._resume() == [1.0, 2.0]
    again._save([1.0, 2.0, 3.0])
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["step-000003"]


def test_a_full_disk_while_saving_keeps_the_older_state(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.distillation import trainer

    student, teacher = pair(tiny, tmp_path)
    run = trainer._Training(student, teacher, PLAN, torch.device("cpu"), tmp_path / "work", "key")
    run._save([1.0])

    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run._accelerator, "save_state", full)
    run._save([1.0, 2.0])
    assert "training state not saved after step 2" in run.warnings[0]
    assert "No space left" in run.warnings[0]
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["step-000001"]


def test_tensors_that_the_model_does_not_have_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    student, teacher = pair(tiny, tmp_path)
    path = student.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, stored twice
    save_file(tensors, path, {"format": "pt"})
    made = distill(
        open_model(student.folder), teacher, PLAN, tmp_path / "out", documents=TEXT, heldout=HELD,
        device="cpu",
    )  # fmt: skip
    after = load_file(made.folder / "model.safetensors")
    assert set(after) == set(tensors)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


def test_an_earlier_run_on_another_device_does_not_decide(tiny: Tiny, tmp_path: Path) -> None:
    from tinier.distillation import trainer

    student, teacher = pair(tiny, tmp_path)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu", "cpu"):
        run = trainer._Training(
            student, teacher, PLAN, torch.device(device), tmp_path / "work", "key"
        )
        assert run._accelerator.device.type == device


def test_state_of_another_run_is_not_continued(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    state = tmp_path / ".out.training" / "step-000007"
    state.mkdir(parents=True)
    (state / "progress.json").write_text(json.dumps({"key": "other", "losses": [1.0] * 7}))
    made = distill(
        student, teacher, PLAN, tmp_path / "out", documents=TEXT, heldout=HELD, device="cpu"
    )
    assert made.manifest is not None
    assert len(made.manifest.measures["loss"]) == 8
    assert made.manifest.measures["loss"][0] != 1.0


def test_learning_rate_warms_up_and_ends_at_the_minimum() -> None:
    rates = [learning_rate(PLAN, step) for step in range(PLAN.steps)]
    assert rates[0] == PLAN.lr / 2
    assert rates[1] == rates[2] == PLAN.lr
    assert rates[-1] == pytest.approx(PLAN.min_lr)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_each_pass_over_the_text_sees_every_window_once() -> None:
    seen = torch.cat([_batch_indices(10, step, PLAN) for step in range(5)])  # 20 draws, two passes
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_a_loss_that_is_no_number_stops_with_advice(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    path = student.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MeasuredFailure, match="the loss is nan at step 1 of 8. Lower the learning"):
        distill(
            open_model(student.folder), teacher, PLAN, tmp_path / "out", documents=TEXT,
            heldout=HELD, device="cpu",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch": 6, "micro_batch": 4}, r"does not divide batch=6. Use one of \[1, 2, 3, 6\]"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "must lie between 0 and lr"),
        ({"steps": 5, "warmup_steps": 5}, "leaves no step"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_plans(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillPlan(**values)  # type: ignore[arg-type]


def test_bad_pairs(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    other = tiny(name="other", vocab_size=300)
    with pytest.raises(InputError, match="vocabularies of 264 and 300"):
        distill(student, other, PLAN, tmp_path / "out", documents=TEXT, heldout=HELD)
    small = quantize(student, QuantizePlan(preset="fp8"), tmp_path / "q")
    with pytest.raises(SchemeError, match="the student .* is quantized"):
        distill(small, teacher, PLAN, tmp_path / "out", documents=TEXT, heldout=HELD)
    with pytest.raises(TextError, match="less than one window"):
        distill(student, teacher, PLAN, tmp_path / "out", documents=["a"], heldout=HELD)
    assert not (tmp_path / "out").exists()
