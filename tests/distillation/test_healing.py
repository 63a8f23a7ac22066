from collections.abc import Callable
from pathlib import Path

import pytest

from tinier.checkpoint import Checkpoint
from tinier.distillation import DistillPlan, HealPlan, healing, plan_prune_and_heal, prune_and_heal
from tinier.errors import InputError
from tinier.families import geometry_of, open_model
from tinier.pruning import PrunePlan

Tiny = Callable[..., Checkpoint]
TEXT = [f"Line {i}: the sum of {i} and {i} is {2 * i}. " * 4 for i in range(60)]
DISTILL = DistillPlan(
    steps=4, batch=2, micro_batch=2, length=32, lr=1e-3, min_lr=1e-4, warmup_steps=1
)


def run(source: Checkpoint, plan: PrunePlan, heal: HealPlan, out: Path) -> Checkpoint:
    return prune_and_heal(
        source, plan, heal, out, text=TEXT, heal_text=TEXT, heldout=TEXT[:20], device="cpu"
    )


@pytest.mark.slow
def test_layers_go_in_rounds_and_a_killed_run_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(num_hidden_layers=8)
    plan = PrunePlan(keep_layers=5, keep_intermediate=64, windows=2, length=32)
    heal = HealPlan(distill=DISTILL, rounds=2)
    whole = run(source, plan, heal, tmp_path / "whole")
    geometry = geometry_of(open_model(whole.folder))
    assert (geometry.layers, geometry.intermediate) == (5, 64)
    calls: list[str] = []
    distil = healing.distill

    def counted(*arguments: object, **options: object) -> Checkpoint:
        calls.append(arguments[3].name)  # type: ignore[attr-defined]
        if len(calls) == 2:
            raise KeyboardInterrupt
        return distil(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(healing, "distill", counted)
    with pytest.raises(KeyboardInterrupt):
        run(source, plan, heal, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = run(source, plan, heal, tmp_path / "out")
    assert calls == ["healed-1", "out", "out"]
    assert again.hash == whole.hash
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_finalists_are_healed_before_one_is_chosen(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    total = geometry_of(source).parameters
    plan = PrunePlan(target=f"{0.7 * total / 1e6:.4f}M", align=16, windows=2, length=32)
    heal = HealPlan(distill=DISTILL, finalists=2, finalist_steps=4)
    made = run(source, plan, heal, tmp_path / "out")
    assert geometry_of(open_model(made.folder)).parameters <= 0.7 * total


@pytest.mark.parametrize(
    ("plan", "heal", "message"),
    [
        (PrunePlan(keep_layers=3), HealPlan(distill=DISTILL, rounds=2), "2 rounds for 1 layers"),
        (
            PrunePlan(keep_intermediate=64),
            HealPlan(distill=DISTILL, rounds=2),
            "rounds spread what --keep-layers drops",
        ),
        (PrunePlan(keep_layers=3), HealPlan(distill=DISTILL, finalists=2), "sizes for a target"),
        (PrunePlan(keep_layers=3), HealPlan(distill=DISTILL, rounds=0), "1 or more"),
    ],
)
def test_bad_plans(
    tiny: Tiny, tmp_path: Path, plan: PrunePlan, heal: HealPlan, message: str
) -> None:
    source = tiny()
    with pytest.raises(InputError, match=message):
        run(source, plan, heal, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(InputError, match=message):
        plan_prune_and_heal(source, plan, heal, TEXT, TEXT, TEXT[:20])
