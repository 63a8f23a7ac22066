import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import DEVICES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.distillation import DistillPlan, distill, trainer
from tinier.distillation.plan import learning_rate
from tinier.distillation.student import Student
from tinier.distillation.trainer import _batch_indices
from tinier.errors import CheckpointError, InputError, MeasuredFailure, SchemeError, TextError
from tinier.families import geometry_of, open_model
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan, quantize
from tinier.text import token_windows
from tinier.tokenizer import load_tokenizer

Tiny = Callable[..., Checkpoint]
ROOT = Path(__file__).parents[2]
TEXT = [f"Line {i}: the sum of {i} and {i} is {2 * i}. " * 4 for i in range(60)]
HELD = [f"Line {i}: the product of {i} and 2 is {2 * i}. " * 4 for i in range(60, 80)]
PLAN = DistillPlan(
    steps=8, batch=4, micro_batch=2, length=32, lr=3e-3, min_lr=1e-3, warmup_steps=2,
    save_seconds=1e9,
)  # fmt: skip


QAT = QuantizePlan(preset="int4-awq", group_size=32, windows=4, length=32)


def run(student: Checkpoint, teacher: Checkpoint, plan: DistillPlan, out: Path) -> Checkpoint:
    return distill(student, teacher, plan, out, text=TEXT, heldout=HELD, device="cpu")


def measures(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.manifest is not None
    return checkpoint.manifest.measures


def pair(tiny: Tiny, tmp_path: Path, **overrides: object) -> tuple[Checkpoint, Checkpoint]:
    teacher = tiny(**overrides)
    return prune(teacher, PrunePlan(drop_layers=(2,), refit=False), tmp_path / "student"), teacher


@pytest.mark.parametrize("device", DEVICES)
def test_the_student_comes_nearer_to_the_teacher(tiny: Tiny, tmp_path: Path, device: str) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, steps=60)
    made = distill(student, teacher, plan, tmp_path / "out", text=TEXT, heldout=HELD, device=device)
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
    made = distill(student, teacher, PLAN, tmp_path / "out", text=TEXT, heldout=HELD, device="cpu")
    assert {info.dtype for info in made.tensors.values()} == {"BF16"}


def die_at_step(monkeypatch: pytest.MonkeyPatch, last: int) -> list[int]:
    """Steps that were begun; the one after `last` of them is interrupted."""
    original = trainer.Trainer._step
    steps: list[int] = []

    def step(self: trainer.Trainer, number: int) -> float:
        steps.append(number)
        if len(steps) == last + 1:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    return steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"train": "lora"}, marks=pytest.mark.slow),
        pytest.param({"top_k": 8}, marks=pytest.mark.slow),
        pytest.param({"quantize": QAT}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, eval_every=2, **options)
    whole = run(student, teacher, plan, tmp_path / "whole")
    eager = dataclasses.replace(plan, save_seconds=0.0)
    steps = die_at_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, eager, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    resumed = run(student, teacher, eager, tmp_path / "out")
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert whole.hash == resumed.hash
    for key in ("loss", "heldout_kl", "step"):
        assert measures(whole)[key] == measures(resumed)[key]
    assert not list(tmp_path.glob(".out*"))


def test_a_kill_while_saving_loses_one_save_only(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    eager = dataclasses.replace(PLAN, save_seconds=0.0)
    steps = die_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, eager, tmp_path / "out")
    work = tmp_path / ".out.training"
    assert [p.name for p in work.glob("step-*")] == ["step-000003"]
    # what a kill leaves: an unfinished save, and an older one whose removal had begun
    (work / "unfinished").mkdir()
    (work / "step-000004").mkdir()
    run(student, teacher, eager, tmp_path / "out")
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 7]


class Written(trainer.TensorWriter):
    """The writer of the result, which has room."""

    add = trainer.TensorWriter.add


def test_no_state_is_unpickled(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write beside the output must not be able to run code by it."""
    student, teacher = pair(tiny, tmp_path)
    eager = dataclasses.replace(PLAN, save_seconds=0.0)
    steps = die_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, eager, tmp_path / "out")
    state = next((tmp_path / ".out.training").glob("step-*"))
    assert {path.suffix for path in state.iterdir()} <= {".safetensors", ".json"}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    run(student, teacher, eager, tmp_path / "out")
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 7]


def test_the_best_weights_of_a_killed_run_are_those_of_their_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after better weights were kept and before a state that knows of them was saved."""
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, eval_every=2)
    whole = run(student, teacher, plan, tmp_path / "whole")
    saves = iter([True, True, True, False, False, False, False, False])
    monkeypatch.setattr(trainer.Trainer, "_agreed", lambda self, yes: yes and next(saves, False))
    eager = dataclasses.replace(plan, save_seconds=0.0)
    die_at_step(monkeypatch, 5)  # states of steps 1 to 3; best weights of steps 2 and 4
    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, eager, tmp_path / "out")
    work = tmp_path / ".out.training"
    assert [p.name for p in work.glob("step-*")] == ["step-000003"]
    assert {p.name for p in work.glob("best-*")} >= {"best-000002.safetensors"}
    assert run(student, teacher, eager, tmp_path / "out").hash == whole.hash


def test_a_full_disk_while_saving_is_a_warning(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    student, teacher = pair(tiny, tmp_path)
    monkeypatch.setattr(trainer.TensorWriter, "add", full)
    monkeypatch.setattr("tinier.distillation.driver.TensorWriter", Written)
    made = run(student, teacher, dataclasses.replace(PLAN, save_seconds=0.0), tmp_path / "out")
    assert made.manifest is not None
    assert "training state not saved after step 1" in made.manifest.warnings[0]
    assert "No space left" in made.manifest.warnings[0]


def test_state_of_another_run_is_not_continued(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    steps = die_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, dataclasses.replace(PLAN, save_seconds=0.0), tmp_path / "out")
    run(student, teacher, dataclasses.replace(PLAN, lr=1e-3), tmp_path / "out")
    assert steps == [0, 1, 2, 3, *range(8)]


def test_the_best_weights_are_the_result_and_the_last_are_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, steps=6, eval_every=2)
    measured = iter([3.0, 2.0, 1.0, 1.5])
    monkeypatch.setattr(trainer.Trainer, "divergence", lambda _: next(measured))
    monkeypatch.setattr("tinier.distillation.driver.check_written", lambda *_: None)
    made = run(student, teacher, plan, tmp_path / "out")
    assert measures(made)["heldout_kl"] == {"0": 3.0, "2": 2.0, "4": 1.0, "6": 1.5}
    assert measures(made)["step"] == 4
    last = open_model(tmp_path / "out-last")
    assert measures(last)["step"] == 6
    assert last.hash != made.hash
    measured = iter([3.0, 2.0, 1.0, 0.5])
    other = run(student, teacher, plan, tmp_path / "other")
    assert other.hash == last.hash
    assert not (tmp_path / "other-last").exists()
    # four steps alone end where the best of six was: the learning rate has the same start
    tail = dataclasses.replace(plan, eval_every=4)
    measured = iter([3.0, 1.0, 1.5])
    assert run(student, teacher, tail, tmp_path / "tail").hash == made.hash


def test_a_student_that_gets_no_better_comes_back_as_it_was(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    measured = iter([1.0, 1.1, 1.2])
    monkeypatch.setattr(trainer.Trainer, "divergence", lambda _: next(measured))
    monkeypatch.setattr("tinier.distillation.driver.check_written", lambda *_: None)
    made = run(student, teacher, dataclasses.replace(PLAN, eval_every=4), tmp_path / "out")
    assert made.hash == student.hash
    assert made.manifest is not None
    assert "no step lowered the held-out KL of 1.0" in made.manifest.warnings[0]


def test_a_loss_that_grows_stops_and_leaves_the_best_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    measured = iter([1.0, 0.5, 9.0])
    monkeypatch.setattr(trainer.Trainer, "divergence", lambda _: next(measured))
    monkeypatch.setattr("tinier.distillation.driver.check_written", lambda *_: None)
    plan = dataclasses.replace(PLAN, eval_every=2)
    with pytest.raises(MeasuredFailure) as failure:
        run(student, teacher, plan, tmp_path / "out")
    assert "the held-out loss went from 1.0 to 9.0 after step 4. Lower the learning" in str(
        failure.value
    )
    assert f"(step 2, held-out KL 0.5) are in {tmp_path / 'out-best'}" in str(failure.value)
    assert measures(open_model(tmp_path / "out-best"))["step"] == 2
    assert not (tmp_path / "out").exists()


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, steps=3, micro_batch=4, precision="float32")
    whole = run(student, teacher, plan, tmp_path / "whole")
    forward = Student.forward

    def small(self: Student, windows: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if len(windows) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return forward(self, windows, *arguments)

    monkeypatch.setattr(Student, "forward", small)
    made = run(student, teacher, plan, tmp_path / "out")
    assert made.manifest is not None
    assert made.manifest.warnings == [
        "out of memory: micro-batch halved to 2, the batch is still 4",
        "out of memory: micro-batch halved to 1, the batch is still 4",
    ]
    assert measures(made)["loss"] == pytest.approx(measures(whole)["loss"], rel=1e-4)
    monkeypatch.setattr(
        Student, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    with pytest.raises((MeasuredFailure, torch.OutOfMemoryError)):
        run(student, teacher, plan, tmp_path / "none")


def test_tensors_that_the_model_does_not_have_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    path = student.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, stored twice
    save_file(tensors, path, {"format": "pt"})
    made = distill(
        open_model(student.folder), teacher, PLAN, tmp_path / "out", text=TEXT, heldout=HELD,
        device="cpu",
    )  # fmt: skip
    after = load_file(made.folder / "model.safetensors")
    assert set(tensors) - set(after) == {
        "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    }  # fmt: skip
    assert not torch.equal(after["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_a_short_run_warms_up_shortly_and_a_low_rate_ends_lower() -> None:
    assert DistillPlan(steps=100).warmup == 10
    assert DistillPlan(steps=4).warmup == 0
    assert DistillPlan(steps=12, lr=7e-6).last_lr == pytest.approx(1e-6)
    assert DistillPlan(lr=3e-4).last_lr == 1e-5


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


def test_a_loss_that_is_no_number_stops_with_advice(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(tiny, tmp_path)
    monkeypatch.setattr(trainer.Trainer, "_gradients", lambda *_: float("nan"))
    with pytest.raises(MeasuredFailure, match="the loss is nan at step 1 of 8. Lower the learning"):
        run(student, teacher, PLAN, tmp_path / "out")
    path = student.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.norm.weight .* no numbers"):
        run(open_model(student.folder), teacher, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch": 6, "micro_batch": 4}, r"does not divide batch=6. Use one of \[1, 2, 3, 6\]"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "must lie between 0 and lr"),
        ({"steps": 5, "warmup_steps": 5}, "leaves no step"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": math.nan}, "temperature=nan. Use a number above 0"),
        ({"lr": math.inf}, "lr=inf. Use a number from 0 on"),
        ({"hidden_weight": math.nan}, "hidden_weight=nan. Use 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps=-1. Use 0 or more"),
        ({"seed": -1}, "seed=-1"),
        ({"loss": "kl"}, "loss='kl'. Use one of forward-kl, reverse-kl, js"),
        ({"ce_weight": 1.5}, "ce_weight=1.5"),
        ({"top_k": 8, "loss": "js"}, "top_k stores probabilities at temperature 1"),
        ({"top_k": 0}, "top_k=0"),
        ({"train": "lora", "quantize": QAT}, "do not go together"),
        ({"train": "some"}, "Use one of all, norms, lora"),
    ],
)
def test_bad_plans(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillPlan(**values)  # type: ignore[arg-type]


def test_bad_pairs(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    other = tiny(name="other", vocab_size=300)
    path = other.folder / "tokenizer.json"
    swapped = path.read_text().replace('"1": ', '"x1": ').replace('"2": ', '"1": ')
    path.write_text(swapped.replace('"x1": ', '"2": '))
    with pytest.raises(InputError, match="different tokenizers"):
        distill(student, other, PLAN, tmp_path / "out", text=TEXT, heldout=HELD)
    small = quantize(student, QuantizePlan(preset="fp8"), tmp_path / "q")
    with pytest.raises(SchemeError, match="the student .* is quantized"):
        distill(small, teacher, PLAN, tmp_path / "out", text=TEXT, heldout=HELD)
    with pytest.raises(TextError, match="less than one window"):
        distill(student, teacher, PLAN, tmp_path / "out", text=["a"], heldout=HELD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "reverse-kl"},
        {"loss": "js", "temperature": 2.0},
        {"ce_weight": 0.1},
        {"hidden_weight": 1.0},
        {"hidden_weight": 1.0, "hidden_loss": "cosine", "hidden_layers": ((2, 3),)},
        {"train": "norms"},
        {"train": "lora"},
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"top_k": 16},
        {"generated": 8},
    ],
)
def test_every_way_of_training_comes_nearer(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, steps=12, lr=1e-3, min_lr=1e-4, **options)
    made = run(student, teacher, plan, tmp_path / "out")
    assert measures(made)["heldout_kl_after"] < measures(made)["heldout_kl_before"]
    before, after = (load_file(m.folder / "model.safetensors") for m in (student, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if options.get("train") == "norms":
        assert changed
        assert all(name.endswith("norm.weight") for name in changed)
    if options.get("train") == "lora":
        assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_what_a_plan_leaves_open_follows_from_the_device_and_the_length() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    plan = DistillPlan(length=512)
    assert (plan.windows_at_once(64, gpu), plan.windows_at_once(64, cpu)) == (16, 4)
    assert dataclasses.replace(plan, length=2048).windows_at_once(64, gpu) == 4
    assert plan.windows_at_once(6, cpu) == 3  # four do not divide six
    assert dataclasses.replace(plan, length=32_768).windows_at_once(64, gpu) == 1
    assert dataclasses.replace(plan, micro_batch=2).windows_at_once(64, gpu) == 2
    assert (plan.recomputes(gpu), plan.recomputes(cpu)) == ("selective", "none")
    assert dataclasses.replace(plan, quantize=QAT).recomputes(gpu) == "full"
    assert dataclasses.replace(plan, checkpointing="none").recomputes(gpu) == "none"


def test_checkpointing_changes_no_number(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, steps=3)
    made = [
        run(student, teacher, dataclasses.replace(plan, checkpointing=mode), tmp_path / mode)
        for mode in ("none", "selective", "full")
    ]
    assert made[0].hash == made[1].hash == made[2].hash


def test_hard_distillation_alone_is_next_token_training(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(
        PLAN, ce_weight=1.0, steps=12, lr=3e-4, min_lr=1e-4, precision="float32"
    )
    made = run(student, teacher, plan, tmp_path / "out")
    losses = measures(made)["loss"]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(student.folder)
    windows = token_windows(load_tokenizer(student), TEXT, length=32, count=48)
    batch = windows[_batch_indices(48, 0, plan)]
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.item()
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_stored_probabilities_serve_another_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.distillation import driver

    student, teacher = pair(tiny, tmp_path)
    plan = dataclasses.replace(PLAN, top_k=16)
    store = tmp_path / "store"
    first = distill(
        student, teacher, plan, tmp_path / "one", text=TEXT, heldout=HELD, device="cpu",
        teacher_store=store,
    )  # fmt: skip
    assert len(list(store.iterdir())) == 2
    monkeypatch.setattr(driver, "store_top_k", lambda *_: pytest.fail("computed again"))
    again = distill(
        student, teacher, dataclasses.replace(plan, eval_every=3), tmp_path / "two",
        text=TEXT, heldout=HELD, device="cpu", teacher_store=store,
    )  # fmt: skip
    assert measures(first)["loss"] == measures(again)["loss"]


def test_layers_are_paired_as_pruning_left_them(tiny: Tiny, tmp_path: Path) -> None:
    from tinier.distillation.plan import layer_pairs, parse_pairs

    student, teacher = pair(tiny, tmp_path)
    assert layer_pairs(student, teacher, PLAN) == ((0, 0), (1, 1), (2, 3))
    other = tiny(name="other", num_hidden_layers=2)
    assert layer_pairs(other, teacher, PLAN) == ((0, 1), (1, 3))
    asked = dataclasses.replace(PLAN, hidden_weight=1.0, hidden_layers=parse_pairs("1:2, 0:1"))
    assert layer_pairs(other, teacher, asked) == ((0, 1), (1, 2))
    with pytest.raises(InputError, match="layers 5:1 do not exist"):
        layer_pairs(
            other, teacher, dataclasses.replace(PLAN, hidden_weight=1.0, hidden_layers=((5, 1),))
        )
    with pytest.raises(InputError, match="'5' is no pair"):
        parse_pairs("5")
    narrow = tiny(name="narrow", hidden_size=32)
    with pytest.raises(InputError, match="width 32 and 64 cannot be compared"):
        layer_pairs(narrow, teacher, PLAN)


def test_tensorboard_has_the_scalars(tiny: Tiny, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    student, teacher = pair(tiny, tmp_path)
    distill(
        student, teacher, PLAN, tmp_path / "out", text=TEXT, heldout=HELD, device="cpu",
        tensorboard=tmp_path / "board",
    )  # fmt: skip
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    names = {"loss", "learning_rate", "tokens_per_s", "share_of_peak_flops", "heldout_kl"}
    assert set(board.Tags()["scalars"]) == names
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 9))


def test_the_result_never_contains_the_teacher(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = pair(tiny, tmp_path)
    made = run(student, teacher, PLAN, tmp_path / "out")
    assert {n: i.shape for n, i in made.tensors.items()} == {
        n: i.shape for n, i in student.tensors.items()
    }
    assert made.disk_bytes < 1.01 * student.disk_bytes + 4096


SCRIPT = """
import sys
from pathlib import Path
from tinier.distillation import DistillPlan, distill
from tinier.families import open_model
from tinier.quantization import QuantizePlan
from tests.distillation.test_trainer import HELD, PLAN, TEXT
import dataclasses, torch
torch.set_num_threads(1)
options = eval(sys.argv[4])
plan = dataclasses.replace(PLAN, precision="float32", eval_every=2, **options)
student, teacher, out = (Path(a) for a in sys.argv[1:4])
distill(open_model(student), open_model(teacher), plan, out, text=TEXT, heldout=HELD, device="cpu")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train": "lora"},
        {"quantize": "QuantizePlan(preset='int4', group_size=32)"},
        {"save_seconds": 0.0},
    ],
)
def test_two_processes_train_as_one(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    """The model sharded over two processes (FSDP2 over gloo): the same losses and weights."""
    student, teacher = pair(tiny, tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = "{" + ", ".join(f"'{k}': {v if k != 'train' else repr(v)}" for k, v in options.items())
    arguments = [str(script), str(student.folder), str(teacher.folder)]
    alone = [sys.executable, *arguments, str(tmp_path / "one"), words + "}"]
    pairwise = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *arguments, str(tmp_path / "two"), words + "}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    for command in (alone, pairwise):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = open_model(tmp_path / "one"), open_model(tmp_path / "two")
    assert measures(two)["loss"] == pytest.approx(measures(one)["loss"], rel=1e-4)
    assert measures(two)["heldout_kl"] == pytest.approx(measures(one)["heldout_kl"], rel=1e-3)
    before, after = (load_file(m.folder / "model.safetensors") for m in (one, two))
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        if tensor.dtype == torch.float32:
            assert torch.allclose(tensor, after[name], atol=2e-4)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
