"""Measure the base and every variant of a run, section by section; what is on disk is not measured again.

Start at `Measurements.all`. A model is loaded once for all its sections; the base stays loaded, for speed
is measured by turns with it. Servers come last, when nothing else is loaded.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from tinier.benchmark import (
    Endpoint,
    LoadResult,
    ServingMemory,
    SpeedResult,
    Workload,
    compare_speed,
    engine_for,
    environment,
    gpu_memory,
    load,
    measure_memory,
)
from tinier.checkpoint import Checkpoint, code_digest, write_atomically
from tinier.device import pick_device, release_memory
from tinier.engine import Decoder, Engine, EngineConfig, load_decoder
from tinier.errors import TinierError
from tinier.evaluation import (
    DraftForecast,
    MmluResult,
    Quality,
    Reference,
    TaskResult,
    evaluate_mmlu,
    evaluate_windows,
    measure_draft,
    reference_states,
    written_text,
)
from tinier.evaluation.quality import OWN_PROMPT
from tinier.progress import say, warn
from tinier.recipe.plan import PlannedRun
from tinier.recipe.results import Failure, Measured, Turns
from tinier.recipe.schema import BASE
from tinier.serving import MAX_BATCH_SIZE, Service
from tinier.text import tensor_sha256
from tinier.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

Measure = Callable[[], Any]

# what each section's figures are made by; its code is what that imports
_MEASURED_BY = {
    "quality": ("tinier.evaluation.quality",), "mmlu": ("tinier.evaluation.mmlu",),
    "memory": ("tinier.benchmark.memory",), "speed": ("tinier.benchmark.speed",),
    "serving": ("tinier.serving.server", "tinier.benchmark.load"),
    "tasks": ("tinier.evaluation.harness",), "long": ("tinier.evaluation.quality",),
    "own_text": ("tinier.evaluation.quality", "tinier.engine"),
    "draft": ("tinier.evaluation.drafting",),
}  # fmt: skip
_SECTIONS: dict[str, TypeAdapter[Any]] = {
    "quality": TypeAdapter(Quality), "mmlu": TypeAdapter(MmluResult),
    "memory": TypeAdapter(ServingMemory), "speed": TypeAdapter(Turns),
    "serving": TypeAdapter(tuple[LoadResult, ...]),
    "tasks": TypeAdapter(tuple[TaskResult, ...]), "long": TypeAdapter(Quality),
    "own_text": TypeAdapter(Quality), "draft": TypeAdapter(DraftForecast),
}  # fmt: skip


def told(error: Exception) -> str:
    log.debug("a variant failed", exc_info=error)
    said = " ".join(str(error).split())
    return said if isinstance(error, TinierError) else f"{type(error).__name__}: {said}"


class _SectionError(Exception):
    """A section that could not be measured."""

    def __init__(self, section: str, cause: Exception) -> None:
        super().__init__(section)
        self.section, self.cause = section, cause


class Measurements:
    """Measures each variant section by section; a section that is on disk is not measured again."""

    def __init__(self, run: PlannedRun, models: dict[str, Checkpoint], out: Path) -> None:
        self._run = run
        self._models = models
        self._folder = out / "measurements"
        self._folder.mkdir(exist_ok=True)
        self._device = pick_device(run.recipe.device)
        self._machine = environment(self._device)
        self._references: dict[str, Reference] = {}
        self._engines: dict[str, Engine] = {}
        self._loaded = False
        """Whether anything was since memory was released"""
        self.seconds = 0.0
        """What all sections took, those found on disk included."""

    def all(self, failed: list[Failure]) -> dict[str, Measured]:
        """By variant. Those that cannot be measured are noted in `failed` instead."""
        measured = self._each(list(self._models), self._engine_sections, failed)
        self._close(*self._engines)
        if not self._run.loads:
            return {name: Measured(**sections) for name, sections in measured.items()}
        served = self._each(list(measured), self._server_sections, failed)
        return {name: Measured(**measured[name], **sections) for name, sections in served.items()}

    def _each(
        self, names: list[str], sections: Callable[[str], dict[str, Measure]], failed: list[Failure]
    ) -> dict[str, dict[str, Any]]:
        measured = {}
        for name in names:
            try:
                measured[name] = self._measure(name, sections(name))
            except _SectionError as error:
                if name == BASE:  # without it nothing can be compared
                    raise error.cause from None
                failed.append(Failure(variant=name, what=error.section, error=told(error.cause)))
                warn(f"{name}: {error.section}: {failed[-1].error}")
            finally:
                if name != BASE:
                    self._close(name)
        return measured

    def _engine_sections(self, name: str) -> dict[str, Measure]:
        sections: dict[str, Measure] = {
            # first: on a GPU loading is a part of it
            "memory": lambda: self._memory(name),
            "quality": lambda: self._quality(name, "quality", self._run.windows),
        }
        long = self._run.long_windows
        if long is not None:
            sections["long"] = lambda: self._quality(name, "long", long)
        if self._run.recipe.measure.quality.own_text and name != BASE:
            sections["own_text"] = lambda: self._own_text(name)
        if self._run.mmlu:
            sections["mmlu"] = lambda: self._mmlu(name)
        if self._run.tasks:
            sections["tasks"] = lambda: self._tasks(name)
        if name != BASE:
            sections["speed"] = lambda: self._speed(name)
        if self._run.recipe.measure.draft and name != BASE:
            sections["draft"] = lambda: self._draft(name)
        return sections

    def _server_sections(self, name: str) -> dict[str, Measure]:
        return {"serving": lambda: self._serving(name)}

    def _measure(self, name: str, sections: dict[str, Measure]) -> dict[str, Any]:
        path = self._folder / f"{name}.json"
        stored = _read_json(path)
        for section, measure in sections.items():
            key = self._key(name, section)
            if stored.get(section, {}).get("key") == key:
                continue
            say(f"{name}: measures {section}")
            self._loaded = True
            started = time.monotonic()
            try:
                value = measure()
            except Exception as error:
                raise _SectionError(section, error) from error
            seconds = time.monotonic() - started
            values = _SECTIONS[section].dump_python(value, mode="json")
            stored[section] = {"key": key, "seconds": round(seconds, 1), "value": values}
            write_atomically(path, json.dumps(stored, indent=1) + "\n")
        self.seconds += sum(stored[section]["seconds"] for section in sections)
        return {
            section: _SECTIONS[section].validate_python(stored[section]["value"])
            for section in sections
        }

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
        if section in ("quality", "own_text"):
            inputs += [tensor_sha256(self._run.windows)]
            inputs += [asked["quality"]["own_text"]] if section == "own_text" else []
        elif section == "long":
            assert self._run.long_windows is not None
            inputs += [tensor_sha256(self._run.long_windows)]
        elif section == "draft":
            inputs += [tensor_sha256(self._run.windows), *hardware]
        elif section == "mmlu":
            inputs += [asked["mmlu"]["shots"], repr(self._run.mmlu)]
        elif section == "tasks":
            inputs += [asked["tasks"]]
        else:
            asked_here = asked["serving"] if section == "serving" else asked["speed"]
            inputs += [asked_here, asked["tensor_parallel"], *hardware]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    @property
    def _largest(self) -> Workload:
        return max(self._run.workloads, key=lambda w: w.concurrency)

    def _engine(self, name: str) -> Engine:
        """One model, loaded once, with room for every workload."""
        if name not in self._engines:
            asked = self._run.recipe.measure
            config = engine_for(
                self._largest, self._run.recipe.device, asked.tensor_parallel, asked.int4_inputs
            )
            self._engines[name] = Engine(self._models[name], config)
        return self._engines[name]

    def _close(self, *names: str) -> None:
        for name in names:
            self._loaded |= self._engines.pop(name, None) is not None
        if self._loaded:  # to look for what may be released takes a moment
            release_memory()
            self._loaded = False

    def _decoder(self, name: str) -> Decoder:
        asked = self._run.recipe.measure
        if asked.tensor_parallel == 1:
            return self._engine(name).decoder
        # an engine's has a share of each layer
        return load_decoder(self._models[name], device=self._device, int4_inputs=asked.int4_inputs)

    def _quality(self, name: str, section: str, windows: Tensor) -> Quality:
        if section not in self._references:
            self._references[section] = reference_states(self._decoder(BASE), windows)
        return evaluate_windows(self._decoder(name), windows, self._references[section])

    def _own_text(self, name: str) -> Quality:
        """The base's divergence along what this model writes, which is not what it was fed."""
        asked = self._run.recipe.measure
        length = asked.quality.own_text
        assert length is not None
        self._close(name)  # it needs an engine with more room
        config = EngineConfig(
            max_seq_len=OWN_PROMPT + length, device=self._run.recipe.device,
            int4_inputs=asked.int4_inputs,
        )  # fmt: skip
        engine = Engine(self._models[name], config)
        windows = written_text(engine, self._run.windows, length)
        reference = reference_states(self._decoder(BASE), windows)
        return evaluate_windows(engine.decoder, windows, reference, given=OWN_PROMPT)

    def _draft(self, name: str) -> DraftForecast:
        return measure_draft(self._decoder(BASE), self._decoder(name), self._run.windows)

    def _mmlu(self, name: str) -> MmluResult:
        mmlu, asked = self._run.mmlu, self._run.recipe.measure.mmlu
        assert mmlu is not None
        assert asked is not None
        tokenizer = load_tokenizer(self._models[name])
        return evaluate_mmlu(self._decoder(name), tokenizer, mmlu, asked.shots)

    def _tasks(self, name: str) -> tuple[TaskResult, ...]:
        from tinier.evaluation.harness import run_tasks  # imports lm-eval, which takes seconds

        assert self._run.tasks is not None
        self._close(name)  # texts need an engine with more room
        asked = self._run.recipe.measure
        return run_tasks(
            str(self._models[name].folder), self._run.tasks, device=self._run.recipe.device,
            int4_inputs=asked.int4_inputs,
        )  # fmt: skip

    def _memory(self, name: str) -> ServingMemory:
        asked = self._run.recipe.measure
        if self._device.type == "cuda" and asked.tensor_parallel == 1:
            self._close(name)
            return gpu_memory(lambda: self._engine(name), self._largest)
        return measure_memory(
            self._models[name], self._largest, self._run.recipe.device, asked.tensor_parallel,
            asked.int4_inputs,
        )  # fmt: skip

    def _speed(self, name: str) -> Turns:
        """Variant and base by turns, for every workload."""
        variant: list[SpeedResult] = []
        base: list[SpeedResult] = []
        engines = {who: self._engine(who) for who in (BASE, name)}
        for workload in self._run.workloads:
            measured = compare_speed(
                engines, workload, base=BASE, repeats=self._run.recipe.measure.speed.repeats,
                seed=self._run.recipe.seed,
            )  # fmt: skip
            variant.append(measured[name])
            base.append(measured[BASE])
        return Turns(variant=tuple(variant), base=tuple(base), paths=variant[-1].paths)

    def _serving(self, name: str) -> tuple[LoadResult, ...]:
        """Each load on a server of this model alone, with the limits that `tinier serve` has."""
        folder = self._models[name].folder
        engine = EngineConfig(
            max_batch_size=MAX_BATCH_SIZE, device=self._run.recipe.device,
            tensor_parallel=self._run.recipe.measure.tensor_parallel,
            int4_inputs=self._run.recipe.measure.int4_inputs,
        )  # fmt: skip
        with Service([f"{name}={folder}"], engine) as service:
            endpoint = Endpoint(url=service.url, model=name, tokenizer=folder)
            return tuple(load(endpoint, list(self._run.loads)))


def _read_json(path: Path) -> dict[str, Any]:
    """An earlier measurement file; empty where there is none, or a power cut left it unreadable."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
