"""Check a recipe from end to end before any work: every stage, every text, every measure.

Start at `plan_recipe`. Each stage is planned on the configuration that the stages before it will
write, so that a group size that does not divide or a layer out of range in the last variant is found
now. `describe` estimates memory, disk and time of the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinier.benchmark import Load, Workload, find_aiperf
from tinier.checkpoint import Checkpoint, StagePlan
from tinier.device import free_memory_bytes, model_flops, pick_device
from tinier.distillation import DistillPlan, distill, plan_distill
from tinier.engine.config import USUAL_SEQ_LEN
from tinier.engine.crew import crew_devices
from tinier.engine.parallel import Share
from tinier.errors import InputError
from tinier.evaluation import MmluPlan, TasksPlan, load_mmlu
from tinier.evaluation.mmlu import Mmlu
from tinier.evaluation.quality import OWN_PROMPT
from tinier.families import Geometry, check_length, geometry_of, open_model
from tinier.progress import warn
from tinier.pruning import PrunePlan, parse_layers, plan_prune, prune
from tinier.quantization import QuantizePlan, plan_quantize, quantize
from tinier.quantization.plan import chosen_presets
from tinier.recipe.schema import BASE, Distill, Quantize, Recipe, Text
from tinier.schemes import Scheme
from tinier.serving import Source
from tinier.text import (
    TextParts,
    load_documents,
    load_parts,
    shortfall,
    text_parts,
    token_windows,
)
from tinier.tokenizer import load_tokenizer


@dataclass(frozen=True)
class PlannedRun:
    """A recipe whose every part was checked."""

    recipe: Recipe
    base: Checkpoint
    parts: TextParts
    windows: torch.Tensor
    """Held-out windows [n, length] on which quality is measured."""
    long_windows: torch.Tensor | None
    """Longer ones, where asked for."""
    mmlu: Mmlu | None
    tasks: TasksPlan | None
    workloads: tuple[Workload, ...]
    loads: tuple[Load, ...]
    """On a server of each model; none if not asked."""
    planned: dict[str, StagePlan]
    """The stage of each variant, in the order of making, planned on checkpoints that are not there
    yet: right configuration, base's files."""


def plan_recipe(recipe: Recipe) -> PlannedRun:
    """Resolve the base model and check everything. Raises the InputError of whatever is wrong."""
    pick_device(recipe.device)
    base = open_model(recipe.base, recipe.revision)
    if "quantization_config" in base.config:
        raise InputError(
            f"the base model {recipe.base} is quantized. Give the 16-bit model. If there is none: "
            f"tinier export {recipe.base} --to 16bit --out DIR"
        )
    quality, speed = recipe.measure.quality, recipe.measure.speed
    loads = _loads(recipe)
    served = [load.input_length + load.output_length for load in loads]
    lengths = [quality.length, speed.input_length + speed.output_length, *served]
    lengths += [quality.long] if quality.long else []
    lengths += [OWN_PROMPT + quality.own_text] if quality.own_text else []
    for length in lengths:
        check_length(base, length)
    parts = _load_text(recipe.text)
    windows = token_windows(
        load_tokenizer(base), parts.heldout, length=quality.length, count=quality.windows
    )
    for warning in shortfall(windows, quality.windows):
        warn(f"measure.quality: {warning}")
    long_windows = None
    if quality.long:
        long_windows = token_windows(
            load_tokenizer(base), parts.heldout, length=quality.long, count=quality.windows
        )
    mmlu = load_mmlu(mmlu_plan(recipe)) if recipe.measure.mmlu else None
    tasks = _tasks(recipe)
    with _located("measure.speed"):
        workloads = tuple(
            Workload(
                concurrency=concurrency,
                input_length=speed.input_length,
                output_length=speed.output_length,
            )
            for concurrency in sorted(set(speed.concurrency))  # the table shows the first and last
        )
    planned: dict[str, StagePlan] = {}
    models = {BASE: base}
    for name in recipe.order():
        with _located(f"variants.{name}"):
            planned[name] = stage_of(recipe, name, models, parts).plan()
        models[name] = replace(base, config=planned[name].output_config)
    check_shared(models, recipe.measure.tensor_parallel, recipe.device)
    return PlannedRun(
        recipe, base, parts, windows, long_windows, mmlu, tasks, workloads, loads, planned
    )


@contextmanager
def _located(place: str) -> Iterator[None]:
    """Errors within say where in the recipe they are."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{place}: {error}") from None


def check_shared(models: dict[str, Checkpoint], tensor_parallel: int, device: str) -> None:
    """Raise InputError where a model's sizes cannot be shared, or there are too few GPUs for it."""
    if tensor_parallel == 1:
        return
    crew_devices(tensor_parallel, pick_device(device))
    for name, model in models.items():
        with _located(name):
            Share(0, tensor_parallel).geometry(geometry_of(model))


class Stage(NamedTuple):
    """The stage that makes one variant."""

    plan: Callable[[], StagePlan]
    make: Callable[[Path], Checkpoint]
    """In the folder that it is given"""


def stage_of(recipe: Recipe, name: str, models: dict[str, Checkpoint], parts: TextParts) -> Stage:
    """The stage of one variant on the models that it needs."""
    variant = recipe.variants[name]
    source, calibration, device = models[variant.from_], parts.calibration, recipe.device
    if variant.quantize:
        grid = quantize_plan(recipe, variant.quantize)
        return Stage(
            partial(plan_quantize, source, grid, calibration),
            partial(quantize, source, grid, text=calibration, device=device),
        )
    if variant.prune:
        cut = prune_plan(recipe, name, models)
        return Stage(
            partial(plan_prune, source, cut, calibration),
            partial(prune, source, cut, text=calibration, device=device),
        )
    assert variant.distill is not None
    training, teacher = distill_plan(recipe, variant.distill), models[variant.distill.teacher]
    return Stage(
        partial(plan_distill, source, teacher, training, parts.training, calibration),
        partial(
            distill, source, teacher, training, text=parts.training, heldout=calibration,
            device=device,
        ),
    )  # fmt: skip


def quantize_plan(recipe: Recipe, asked: Quantize) -> QuantizePlan:
    return QuantizePlan(**asked.model_dump(), seed=recipe.seed)


def prune_plan(recipe: Recipe, name: str, models: dict[str, Checkpoint]) -> PrunePlan:
    asked = recipe.variants[name].prune
    assert asked is not None
    dropped = parse_layers(asked.drop_layers) if asked.drop_layers is not None else ()
    later = _later_schemes(recipe, name, geometry_of(models[BASE])) if asked.target else ()
    return PrunePlan(**asked.model_dump() | {"drop_layers": dropped}, later=later)


def _later_schemes(recipe: Recipe, name: str, geometry: Geometry) -> tuple[Scheme, ...]:
    """How the variants that start from this one, however far down, store their linear layers."""
    found: dict[Scheme, None] = {}
    for other, variant in recipe.variants.items():
        if variant.from_ != name:
            continue
        grid = variant.quantize or (variant.distill and variant.distill.quantize)
        if grid:
            presets = chosen_presets(geometry, quantize_plan(recipe, grid))
            found |= {p.scheme: None for n, p in presets.items() if ".layers." in n}
        found |= dict.fromkeys(_later_schemes(recipe, other, geometry))
    return tuple(found)


def distill_plan(recipe: Recipe, asked: Distill) -> DistillPlan:
    values = asked.model_dump(exclude={"teacher", "quantize"})
    grid = quantize_plan(recipe, asked.quantize) if asked.quantize else None
    return DistillPlan(**values, quantize=grid, seed=recipe.seed)


def mmlu_plan(recipe: Recipe) -> MmluPlan:
    asked = recipe.measure.mmlu
    assert asked is not None
    return MmluPlan(**asked.model_dump(), seed=recipe.seed)


def _tasks(recipe: Recipe) -> TasksPlan | None:
    """Tasks of lm-eval. Raises InputError for one that it does not know, or without it."""
    asked = recipe.measure.tasks
    if asked is None:
        return None
    from tinier.evaluation.harness import check_tasks  # imports lm-eval, which takes seconds

    plan = TasksPlan(**asked.model_dump(), seed=recipe.seed)
    check_tasks(plan)
    return plan


def _loads(recipe: Recipe) -> tuple[Load, ...]:
    """Loads on a server. Raises InputError for one that cannot be, or without AIPerf."""
    asked = recipe.measure.serving
    if asked is None:
        return ()
    find_aiperf()
    for name in recipe.variants:
        Source.parse(f"{name}=served")
    room = USUAL_SEQ_LEN
    if asked.input_length + asked.output_length > room:
        raise InputError(
            f"measure.serving: {asked.input_length} + {asked.output_length} tokens; `tinier serve` has "
            f"room for {room}. Use fewer."
        )
    same = asked.model_dump(exclude={"concurrency", "request_rate"}) | {"seed": recipe.seed}
    return (
        *(Load(concurrency=number, **same) for number in asked.concurrency),
        *(Load(request_rate=rate, **same) for rate in asked.request_rate),
    )


def describe(run: PlannedRun, out: Path) -> dict[str, Any]:
    """The resolved plan with estimated memory, disk and time, for `--dry-run`.

    Times come from a matmul timed now and the arithmetic of each step; they leave out start-up.
    """
    device = pick_device(run.recipe.device)
    flops_per_s = model_flops(device)
    stages: list[dict[str, Any]] = []
    for name, stage in run.planned.items():
        stages.append(
            {
                "variant": name,
                "from": run.recipe.variants[name].from_,
                "stage": stage.stage,
                "parameters": stage.parameters,
                "disk_bytes": stage.output_bytes,
                "memory_bytes": stage.memory_bytes,
                "seconds": round(stage.estimated_seconds(flops_per_s), 1),
            }
        )
    measuring = _measure_flops(run) / flops_per_s
    return {
        "base": str(run.base.folder),
        "layers": geometry_of(run.base).layers,
        "parameters": geometry_of(run.base).parameters,
        "device": str(device),
        "free_memory_bytes": free_memory_bytes(device),
        "out": str(out),
        "text_sha256": run.parts.sha256,
        "stages": stages,
        "measure": run.recipe.measure.model_dump(mode="json"),
        "estimated_disk_bytes": sum(s["disk_bytes"] for s in stages),
        # base and variant are loaded together when their speed is compared
        "estimated_peak_memory_bytes": max(
            [s["memory_bytes"] for s in stages] + [2 * run.base.weight_bytes]
        ),
        "estimated_seconds": round(sum(s["seconds"] for s in stages) + measuring),
    }


def _measure_flops(run: PlannedRun) -> float:
    """Arithmetic of evaluation and benchmark over the base and all variants."""
    tokens = run.windows.numel()
    if run.mmlu:
        tokens += len(run.mmlu.questions) * 150 * (1 + run.recipe.measure.mmlu.shots)  # type: ignore[union-attr]
    rounds = (run.recipe.measure.speed.repeats + 1) * 2
    for w in run.workloads:
        tokens += rounds * w.concurrency * (w.input_length + w.output_length)
    for load in run.loads:
        tokens += load.requests * (load.input_length + load.output_length)
    return 2.0 * geometry_of(run.base).active_parameters * tokens * (1 + len(run.recipe.variants))


def _load_text(text: str | Text) -> TextParts:
    if isinstance(text, str):
        return load_parts(text)
    return text_parts(
        load_documents(text.calibration),
        load_documents(text.training),
        load_documents(text.heldout),
    )
