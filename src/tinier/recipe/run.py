"""Run a recipe: make every variant, measure it, keep what is done.

Start at `run_recipe`. The run folder has `variants/NAME/` (checkpoints), `measurements/NAME.json`
and `results.json`. A variant whose manifest has the key that the plan asks for, and a measurement
whose key is that of its inputs, are not made again; anything else is.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tinier.benchmark import Endpoint, bench, environment, load, measure_memory
from tinier.checkpoint import (
    Checkpoint,
    check_disk,
    check_output,
    code_digest,
    finished_checkpoint,
    hold,
    open_checkpoint,
    write_atomically,
)
from tinier.device import pick_device, release_memory
from tinier.engine import Decoder, EngineConfig, load_decoder
from tinier.errors import OutputError, TinierError
from tinier.evaluation import Reference, evaluate, evaluate_mmlu, reference_states
from tinier.progress import say, warn
from tinier.recipe.plan import PlannedRun, plan_recipe, stage_of
from tinier.recipe.results import assemble, read_endpoints
from tinier.recipe.schema import BASE, Recipe
from tinier.serving import MAX_BATCH_SIZE, Service
from tinier.text import tensor_sha256
from tinier.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

# what each section's figures are made by; its code is what that imports
_MEASURED_BY = {
    "quality": ("tinier.evaluation.quality",), "mmlu": ("tinier.evaluation.mmlu",),
    "memory": ("tinier.benchmark.memory",), "speed": ("tinier.benchmark.speed",),
    "serving": ("tinier.serving.server", "tinier.benchmark.load"),
}  # fmt: skip
_MARKER = "recipe.json"
# no variant's name has these in it
_FRESH, _OLD = "+new", "+old"


def run_recipe(recipe: Recipe, out: Path, *, command: str) -> dict[str, Any]:
    """Make and measure every variant; returns the results, which are also in out/results.json.

    command: what the user typed, for the record. A run that was killed goes on where it was. A variant that
    cannot be made or measured is named among the results' `failed`, and the others are there.
    Raises the InputError of whatever is wrong with the recipe before any work, OutputError for a folder
    that is not a run's or is in use, and whatever goes wrong with the base model.
    """
    check_run_folder(out)
    run = plan_recipe(recipe)
    check_disk(out, _missing_bytes(run, out))
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, out / ".lock"):
        write_atomically(out / _MARKER, recipe.model_dump_json(indent=1, by_alias=True) + "\n")
        failed: list[Failure] = []
        models = _make_variants(run, out, failed)
        measuring = _Measurements(run, models, out)
        measurements = measuring.all(failed)
        results = assemble(
            run,
            {name: model for name, model in models.items() if name in measurements},
            measurements,
            failed=[failure._asdict() for failure in failed],
            environment=environment(pick_device(recipe.device)),
            command=command,
            measuring_seconds=measuring.seconds,
            endpoints=read_endpoints(out),
        )
        write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


class Failure(NamedTuple):
    """What went wrong with one variant."""

    variant: str
    what: str
    """The stage, or the section that was measured"""
    error: str


def _make_variants(run: PlannedRun, out: Path, failed: list[Failure]) -> dict[str, Checkpoint]:
    """Every variant's checkpoint, made now or found made; those that cannot be are noted in `failed`."""
    models = {BASE: run.base}
    for name in run.recipe.order():
        missing = [needed for needed in run.recipe.needs(name) if needed not in models]
        if missing:
            failed.append(Failure(name, "stage", f"it needs {missing[0]}, which failed"))
            continue
        try:
            models[name] = _make_variant(run, out / "variants", name, models)
        except Exception as error:  # whatever it is, the others need not be lost
            failed.append(Failure(name, "stage", _told(error)))
            warn(f"{name}: {failed[-1].error}")
        release_memory()
    return models


def _told(error: Exception) -> str:
    log.debug("a variant failed", exc_info=error)
    said = " ".join(str(error).split())
    return said if isinstance(error, TinierError) else f"{type(error).__name__}: {said}"


def _make_variant(
    run: PlannedRun, folder: Path, name: str, models: dict[str, Checkpoint]
) -> Checkpoint:
    """One variant, made in `folder`/NAME unless it is there.

    One that is made from other inputs, or by other code, is made again beside the old one, which goes when
    the new one is whole.
    """
    made_by = stage_of(run.recipe, name, models, run.parts)
    stage = made_by.plan()
    current, fresh = folder / name, folder / f"{name}{_FRESH}"
    if finished_checkpoint(fresh, stage.key) is not None:  # killed before it took its place
        _replace(current, fresh)
    found = finished_checkpoint(current, stage.key)
    if found is not None:
        say(f"{name}: is there")
        for warning in found.manifest.warnings if found.manifest else []:
            say(f"{name}: warning: {warning}")
        return found
    say(f"{name}: {stage.stage} {run.recipe.variants[name].from_}")
    if not current.exists():
        return made_by.make(current)
    say(f"{name}: was made from other inputs or code; the old one stays until the new one is there")
    for path in (fresh, fresh.with_name(f"{fresh.name}-last")):
        shutil.rmtree(path, ignore_errors=True)
    made_by.make(fresh)
    _replace(current, fresh)
    return open_checkpoint(current)


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


class _SectionError(Exception):
    """A section that could not be measured."""

    def __init__(self, section: str, cause: Exception) -> None:
        super().__init__(section)
        self.section, self.cause = section, cause


class _Measurements:
    """Measures each variant section by section; a section that is on disk is not measured again."""

    def __init__(self, run: PlannedRun, models: dict[str, Checkpoint], out: Path) -> None:
        self._run = run
        self._models = models
        self._folder = out / "measurements"
        self._folder.mkdir(exist_ok=True)
        self._device = pick_device(run.recipe.device)
        self._machine = environment(self._device)
        self._reference: Reference | None = None
        self.seconds = 0.0
        """What all sections took, those found on disk included."""

    def all(self, failed: list[Failure]) -> dict[str, dict[str, Any]]:
        """Sections by variant: `quality`, `mmlu` where asked, `memory`, `speed`. Variants that cannot be
        measured are noted in `failed` instead."""
        measured = {}
        for name in self._models:
            try:
                measured[name] = self._measure(name)
            except _SectionError as error:
                if name == BASE:  # without it nothing can be compared
                    raise error.cause from None
                failed.append(Failure(name, error.section, _told(error.cause)))
                warn(f"{name}: {error.section}: {failed[-1].error}")
        return measured

    def _measure(self, name: str) -> dict[str, Any]:
        sections: dict[str, Callable[[], Any]] = {"quality": lambda: self._quality(name)}
        if self._run.mmlu:
            sections["mmlu"] = lambda: self._mmlu(name)
        sections["memory"] = lambda: self._memory(name)
        if name != BASE:
            sections["speed"] = lambda: self._speed(name)
        if self._run.loads:
            sections["serving"] = lambda: self._serving(name)
        path = self._folder / f"{name}.json"
        stored = _read_json(path)
        for section, measure in sections.items():
            key = self._key(name, section)
            if stored.get(section, {}).get("key") == key:
                continue
            say(f"{name}: measures {section}")
            started = time.monotonic()
            try:
                value = measure()
            except Exception as error:
                raise _SectionError(section, error) from error
            seconds = time.monotonic() - started
            stored[section] = {"key": key, "seconds": round(seconds, 1), "value": value}
            write_atomically(path, json.dumps(stored, indent=1) + "\n")
            release_memory()
        self.seconds += sum(stored[section]["seconds"] for section in sections)
        return {section: stored[section]["value"] for section in sections}

    def _key(self, name: str, section: str) -> str:
        """Hash of everything that a section's figures depend on."""
        recipe = self._run.recipe
        asked = recipe.measure.model_dump(mode="json")
        machine = self._machine
        inputs = [
            self._models[name].hash, self._models[BASE].hash, code_digest(*_MEASURED_BY[section]),
            recipe.seed, str(self._device), machine["versions"]["torch"],
            machine["versions"]["transformers"], asked["int4_inputs"],
        ]  # fmt: skip
        hardware = [
            machine["cpu"],
            machine["cpu_cores"],
            machine["torch_threads"],
            machine.get("gpu"),
        ]
        if section == "quality":
            inputs += [tensor_sha256(self._run.windows)]
        elif section == "mmlu":
            inputs += [asked["mmlu"]["shots"], repr(self._run.mmlu)]
        else:
            asked_here = asked["serving"] if section == "serving" else asked["speed"]
            inputs += [asked_here, asked["tensor_parallel"], *hardware]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def _decoder(self, name: str) -> Decoder:
        inputs = self._run.recipe.measure.int4_inputs
        return load_decoder(self._models[name], device=self._device, int4_inputs=inputs)

    def _quality(self, name: str) -> dict[str, Any]:
        if self._reference is None:
            self._reference = reference_states(self._decoder(BASE), self._run.windows)
        return asdict(evaluate(self._decoder(name), self._run.windows, self._reference))

    def _mmlu(self, name: str) -> dict[str, Any]:
        mmlu, asked = self._run.mmlu, self._run.recipe.measure.mmlu
        assert mmlu is not None
        assert asked is not None
        tokenizer = load_tokenizer(self._models[name])
        return asdict(evaluate_mmlu(self._decoder(name), tokenizer, mmlu, asked.shots))

    def _memory(self, name: str) -> dict[str, Any]:
        largest = max(self._run.workloads, key=lambda w: w.concurrency)
        memory = measure_memory(
            self._models[name], largest, self._run.recipe.device,
            self._run.recipe.measure.tensor_parallel, self._run.recipe.measure.int4_inputs,
        )  # fmt: skip
        return asdict(memory)

    def _speed(self, name: str) -> dict[str, Any]:
        """Variant and base by turns, for every workload."""
        results: dict[str, Any] = {"variant": [], "base": [], "paths": {}}
        for workload in self._run.workloads:
            measured = bench(
                {who: self._models[who] for who in (BASE, name)},
                workload,
                base=BASE,
                repeats=self._run.recipe.measure.speed.repeats,
                seed=self._run.recipe.seed,
                device=self._run.recipe.device,
                tensor_parallel=self._run.recipe.measure.tensor_parallel,
                int4_inputs=self._run.recipe.measure.int4_inputs,
            )
            results["paths"] = measured[name].paths
            results["variant"].append(asdict(measured[name]))
            results["base"].append(asdict(measured[BASE]))
        return results

    def _serving(self, name: str) -> list[dict[str, Any]]:
        """Each load on a server of this model alone, with the limits that `tinier serve` has."""
        folder = self._models[name].folder
        engine = EngineConfig(
            max_batch_size=MAX_BATCH_SIZE, device=self._run.recipe.device,
            tensor_parallel=self._run.recipe.measure.tensor_parallel,
            int4_inputs=self._run.recipe.measure.int4_inputs,
        )  # fmt: skip
        with Service([f"{name}={folder}"], engine) as service:
            endpoint = Endpoint(url=service.url, model=name, tokenizer=folder)
            return [asdict(result) for result in load(endpoint, list(self._run.loads))]


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


def _read_json(path: Path) -> dict[str, Any]:
    """An earlier measurement file; empty where there is none, or a power cut left it unreadable."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
