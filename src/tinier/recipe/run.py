"""Run a recipe: make every variant, measure it, keep what is done.

Start at `run_recipe`. The run folder has `variants/NAME/` (checkpoints), `measurements/NAME.json`
and `results.json`. A variant whose manifest has the key that the plan asks for, and a measurement
whose key is that of its inputs, are not made again; anything else is.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from tinier.benchmark import environment
from tinier.checkpoint import (
    Checkpoint,
    check_disk,
    check_output,
    finished_checkpoint,
    hold,
    open_checkpoint,
    write_atomically,
)
from tinier.device import pick_device, release_memory
from tinier.errors import OutputError
from tinier.progress import say, warn
from tinier.recipe.measure import Measurements, told
from tinier.recipe.plan import PlannedRun, Stage, plan_recipe, stage_of
from tinier.recipe.results import Failure, RunResults, assemble, read_endpoints
from tinier.recipe.schema import BASE, Recipe

_MARKER = "recipe.json"
# no variant's name has these in it
_FRESH, _OLD = "+new", "+old"


def run_recipe(
    recipe: Recipe, out: Path | str, *, command: str = "", named: Collection[str] = ()
) -> RunResults:
    """Make and measure every variant; returns the results, which are also in out/results.json.

    command: what the user typed, for the record. named: variants of which nothing is said while they are
    there, because it was said before. A run that was killed goes on where it was. A variant that
    cannot be made or measured is named among the results' `failed`, and the others are there.
    Raises the InputError of whatever is wrong with the recipe before any work, OutputError for a folder
    that is not a run's or is in use, and whatever goes wrong with the base model.
    """
    out = Path(out)
    check_run_folder(out)
    run = plan_recipe(recipe)
    check_disk(out, _missing_bytes(run, out))
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, out / ".lock"):
        write_atomically(out / _MARKER, recipe.model_dump_json(indent=1, by_alias=True) + "\n")
        failed: list[Failure] = []
        models = _make_variants(run, out, failed, named)
        measuring = Measurements(run, models, out)
        measurements = measuring.all(failed)
        results = assemble(
            run,
            {name: model for name, model in models.items() if name in measurements},
            measurements,
            failed=failed,
            environment=environment(pick_device(recipe.device)),
            command=command,
            measuring_seconds=measuring.seconds,
            endpoints=read_endpoints(out),
        )
        write_atomically(out / "results.json", json.dumps(results.to_json(), indent=1) + "\n")
    return results


def _make_variants(
    run: PlannedRun, out: Path, failed: list[Failure], named: Collection[str]
) -> dict[str, Checkpoint]:
    """Every variant's checkpoint, made now or found made; those that cannot be are noted in `failed`."""
    models = {BASE: run.base}
    for name in run.recipe.order():
        missing = [needed for needed in run.recipe.needs(name) if needed not in models]
        if missing:
            error = f"it needs {missing[0]}, which failed"
            failed.append(Failure(variant=name, what="stage", error=error))
            continue
        current = out / "variants" / name
        try:
            made_by = stage_of(run.recipe, name, models, run.parts)
            stage = made_by.plan()
            found = _finished(current, stage.key)
            if found is not None:
                models[name] = found
                if name not in named:
                    _say_it_is_there(name, found)
                continue  # nothing was loaded: to look for what may be released takes a moment
            say(f"{name}: {stage.stage} {run.recipe.variants[name].from_}")
            models[name] = _make_variant(made_by, current, name)
        except Exception as error:  # whatever it is, the others need not be lost
            failed.append(Failure(variant=name, what="stage", error=told(error)))
            warn(f"{name}: {failed[-1].error}")
        release_memory()
    return models


def _finished(current: Path, key: str) -> Checkpoint | None:
    """A variant that was made from the same inputs by the same code; None: there is none."""
    fresh = _fresh(current)
    if finished_checkpoint(fresh, key) is not None:  # killed before it took its place
        _replace(current, fresh)
    return finished_checkpoint(current, key)


def _say_it_is_there(name: str, found: Checkpoint) -> None:
    say(f"{name}: is there")
    for warning in found.manifest.warnings if found.manifest else []:
        say(f"{name}: warning: {warning}")


def _make_variant(made_by: Stage, current: Path, name: str) -> Checkpoint:
    """One variant, made in the folder `current`. What was made there from other inputs, or by other code,
    goes when the new one is whole."""
    if not current.exists():
        return made_by.make(current)
    say(f"{name}: was made from other inputs or code; the old one stays until the new one is there")
    fresh = _fresh(current)
    for path in (fresh, fresh.with_name(f"{fresh.name}-last")):
        shutil.rmtree(path, ignore_errors=True)
    made_by.make(fresh)
    _replace(current, fresh)
    return open_checkpoint(current)


def _fresh(current: Path) -> Path:
    """Where a variant is made that takes another's place."""
    return current.with_name(f"{current.name}{_FRESH}")


def _replace(current: Path, fresh: Path) -> None:
    """Put a new variant in the place of the old one, with what distillation keeps beside it."""
    for end in ("-last", "-best", ""):
        new, place = (path.with_name(f"{path.name}{end}") for path in (fresh, current))
        old = current.with_name(f"{current.name}{end}{_OLD}")
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        if new.exists():
            new.rename(place)
        shutil.rmtree(old, ignore_errors=True)


def check_run_folder(out: Path) -> None:
    """Raise OutputError for a folder that holds something, but no run, or that cannot be made."""
    if not out.exists():
        check_output(out)
        return
    # what starts with a dot is a lock or a leftover of a run that was killed early
    visible = not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    if visible and not ((out / _MARKER).is_file() or (out / "fit").is_dir()):
        raise OutputError(
            f"{out} exists and is not a run folder. Choose another --out; a run folder of the same "
            "recipe is continued."
        )


def _missing_bytes(run: PlannedRun, out: Path) -> int:
    """About what the variants that are not there yet will take on disk."""
    return sum(
        stage.output_bytes
        for name, stage in run.planned.items()
        if not (out / "variants" / name).exists()
    )
