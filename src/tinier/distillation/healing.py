"""Prune a little, heal, prune again; and let candidates for a target prove themselves first.

Start at `prune_and_heal`. Layers that go in several rounds, each followed by distillation from the
original, leave a better model than all at once (arXiv 2503.06291); which of several sizes is best can
change once they were trained a little (arXiv 2407.14679, section 4.3). Every part is a checkpoint of
its own in a hidden folder beside `out`, so a run that was killed goes on from the last one.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinier.checkpoint import Checkpoint, StagePlan, check_output, finished_checkpoint
from tinier.device import pick_device, release_memory
from tinier.distillation.driver import distill
from tinier.distillation.plan import DistillPlan, plan_distill
from tinier.errors import InputError
from tinier.families import geometry_of, open_model
from tinier.progress import say
from tinier.pruning import PrunePlan, choose, plan_prune, prune, write_pruned
from tinier.pruning.plan import calibration_windows, wanted_sizes
from tinier.text import BUILTIN, Document, Text, documents_of


@dataclass(frozen=True, slots=True, kw_only=True)
class HealPlan:
    distill: DistillPlan
    """How each round is healed; the last one's result is the result."""
    rounds: int = 1
    """Rounds that the layers to drop are spread over."""
    finalists: int = 1
    """Sizes for a target that are healed briefly before one is chosen."""
    finalist_steps: int = 20
    """Steps of that."""


def prune_and_heal(
    source: Checkpoint,
    plan: PrunePlan,
    heal: HealPlan,
    out: Path | str,
    *,
    text: Text = BUILTIN,
    heal_text: Text = BUILTIN,
    heldout: Text = BUILTIN,
    device: str = "auto",
) -> Checkpoint:
    """Write `source`, pruned and distilled from itself, to the new folder `out`; returns it opened.

    text: to calibrate pruning on; heal_text, heldout: of distillation. Raises what `prune` and
    `distill` raise.
    """
    out = Path(out)
    check_output(out)
    documents, training, held = (
        documents_of(text, "calibration"), documents_of(heal_text, "training"),
        documents_of(heldout, "heldout"),
    )  # fmt: skip
    plan_prune_and_heal(source, plan, heal, documents, training, held)
    parts = _rounds(source, plan, heal)
    work = out.parent / f".{out.name}.healing"
    work.mkdir(parents=True, exist_ok=True)
    model = source
    for number, part in enumerate(parts, 1):
        folder = work / f"pruned-{number}"
        stage = plan_prune(model, part, documents)
        if heal.finalists > 1:
            pruned = _best_finalist(
                source, part, heal, work, folder, documents, training, held, device
            )
        else:
            pruned = _made(
                folder, stage.key,
                lambda folder=folder, part=part, model=model: prune(  # type: ignore[misc]
                    model, part, folder, text=documents, device=device
                ),
            )  # fmt: skip
        if number == len(parts):
            break
        say(f"round {number} of {len(parts)}: {geometry_of(pruned).layers} layers, healing")
        model = _healed(
            pruned, source, heal.distill, work / f"healed-{number}", training, held, device
        )
    made = distill(pruned, source, heal.distill, out, text=training, heldout=held, device=device)
    shutil.rmtree(work)
    return made


def plan_prune_and_heal(
    source: Checkpoint, plan: PrunePlan, heal: HealPlan,
    text: Text = BUILTIN, heal_text: Text = BUILTIN, heldout: Text = BUILTIN,
) -> StagePlan:  # fmt: skip
    """The pruning that `prune_and_heal` would do first, after every check of it and of the healing."""
    _rounds(source, plan, heal)
    stage = plan_prune(source, plan, text)
    plan_distill(source, source, heal.distill, heal_text, heldout)
    return stage


def _rounds(source: Checkpoint, plan: PrunePlan, heal: HealPlan) -> list[PrunePlan]:
    """The pruning of each round."""
    for name in ("rounds", "finalists", "finalist_steps"):
        if getattr(heal, name) < 1:
            raise InputError(f"{name}={getattr(heal, name)}. Use 1 or more.")
    if heal.finalists > 1 and plan.target is None:
        raise InputError("finalists are sizes for a target. Give --target, or leave them out.")
    if heal.rounds == 1:
        return [plan]
    total = geometry_of(source).layers
    if plan.keep_layers is None:
        raise InputError("rounds spread what --keep-layers drops. Give it, or leave --rounds out.")
    count = total - wanted_sizes(source, plan).layers
    if heal.rounds > count:
        raise InputError(f"{heal.rounds} rounds for {count} layers. Use at most {count} rounds.")
    ends = [round(count * (i + 1) / heal.rounds) for i in range(heal.rounds)]
    # widths go with the last round: a healed model is cut once
    deep = replace(
        plan,
        keep_hidden=None,
        keep_intermediate=None,
        keep_heads=None,
        keep_kv_heads=None,
        keep_experts=None,
    )
    early = [replace(deep, keep_layers=total - end) for end in ends[:-1]]
    return [*early, replace(plan, keep_layers=total - count)]


def _best_finalist(
    source: Checkpoint,
    plan: PrunePlan,
    heal: HealPlan,
    work: Path,
    folder: Path,
    documents: Sequence[Document],
    training: Sequence[Document],
    heldout: Sequence[Document],
    device: str,
) -> Checkpoint:
    """The candidate of lowest held-out KL after a short training, untrained."""
    stage = plan_prune(source, plan, documents)
    found = finished_checkpoint(folder, stage.key)
    if found is not None:
        return found
    place = pick_device(device)
    windows = calibration_windows(source, plan, documents)
    choices = choose(source, plan, windows, place)[: heal.finalists]
    steps = heal.finalist_steps
    warmup = min(heal.distill.warmup, steps // 4)
    short = replace(heal.distill, steps=steps, warmup_steps=warmup, eval_every=steps)
    results: list[tuple[float, int]] = []
    for number, choice in enumerate(choices):
        started = time.monotonic()
        candidate = work / f"candidate-{number}"
        shutil.rmtree(candidate, ignore_errors=True)
        pruned = write_pruned(source, plan, stage, choice, windows, candidate, [], place, started)
        trained = _healed(
            pruned, source, short, work / f"candidate-{number}-healed", training, heldout, device
        )
        assert trained.manifest is not None
        kl = trained.manifest.measures["heldout_kl_after"]
        results.append((kl, number))
        sizes = choice.cut.sizes(geometry_of(source)).label
        say(f"candidate {number + 1}: {sizes}: held-out KL {kl} after {steps} steps")
    best = min(results)[1]
    shutil.rmtree(folder, ignore_errors=True)
    (work / f"candidate-{best}").rename(folder)
    return open_model(folder)


def _healed(
    pruned: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    folder: Path,
    training: Sequence[Document],
    heldout: Sequence[Document],
    device: str,
) -> Checkpoint:
    stage = plan_distill(pruned, teacher, plan, training, heldout)

    def make() -> Checkpoint:
        made = distill(pruned, teacher, plan, folder, text=training, heldout=heldout, device=device)
        shutil.rmtree(folder.with_name(f"{folder.name}-last"), ignore_errors=True)
        return made

    return _made(folder, stage.key, make)


def _made(folder: Path, key: str, make: Callable[[], Checkpoint]) -> Checkpoint:
    """The checkpoint of a stage, made unless a run that was killed left it."""
    found = finished_checkpoint(folder, key)
    if found is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    made = make()
    release_memory()
    return made
