"""What a run measured: `results.json` as Python objects, and how they are made from measurements.

Start at `RunResults` and `assemble`. The schema is numbered; `docs/results.md` describes it.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

import tinier
from tinier.benchmark import LoadResult, ServingMemory, SpeedResult, Statistic
from tinier.checkpoint import Checkpoint, hold, write_atomically
from tinier.errors import InputError
from tinier.evaluation import (
    DraftForecast,
    MmluResult,
    PairedChange,
    Quality,
    TaskResult,
    compare_answers,
    task_changes,
)
from tinier.families import checkpoint_layout, geometry_of
from tinier.recipe.plan import PlannedRun
from tinier.recipe.schema import BASE
from tinier.search import Candidate, Choices, choose, pareto_front

SCHEMA = 1
_RESULTS, _ENDPOINTS = "results.json", "endpoints.json"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong with one variant."""

    variant: str
    what: str
    """The stage, or the section that was measured"""
    error: str


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Speed of a variant and of the base, measured by turns; a result for each workload."""

    variant: tuple[SpeedResult, ...]
    base: tuple[SpeedResult, ...]
    paths: dict[str, bool]
    """How the variant's linear layers were multiplied, each with whether the device does so natively"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Every section that was measured of one model."""

    memory: ServingMemory
    quality: Quality
    long: Quality | None = None
    own_text: Quality | None = None
    mmlu: MmluResult | None = None
    tasks: tuple[TaskResult, ...] = ()
    speed: Turns | None = None
    """None for the base, whose speed is measured beside each variant"""
    draft: DraftForecast | None = None
    serving: tuple[LoadResult, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """The base, or a variant."""

    name: str
    from_: Annotated[str | None, Field(alias="from")]
    stage: str | None
    checkpoint: str
    """Relative to the run folder; the base's is absolute"""
    content_hash: str
    precision: str
    layers: int
    parameters: int
    disk_bytes: int
    weight_bytes: int
    bits_per_weight: float
    """All stored tensors over all parameters, a tied head once"""
    quality: Quality
    mmlu: MmluResult | None
    memory: ServingMemory
    speed: tuple[SpeedResult, ...]
    """In the order of concurrency"""
    serving: tuple[LoadResult, ...] | None
    speedup: float
    """Output tokens/s over the base's, at the largest concurrency"""
    shrinkage: float
    """The base's bytes on disk over this one's"""
    retained_quality: float
    """exp(-KL): the likelihood, per token of the base's own text, that is left"""
    collapsed: bool
    stage_seconds: float | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    long: Quality | None = None
    """On longer windows"""
    own_text: Quality | None = None
    """Along what this model writes greedily, from the base's predictions there"""
    draft: DraftForecast | None = None
    """What it gains as the base's draft"""
    tasks: tuple[TaskResult, ...] = ()
    changes: dict[str, PairedChange] = field(default_factory=dict)
    """Of answers against the base's, in pairs: by `mmlu`, and `TASK/METRIC`"""


@dataclass(frozen=True, kw_only=True)
class Fronts:
    """Names of models that none beats in quality and in this."""

    throughput: tuple[str, ...]
    size: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EndpointResult:
    """Loads on a server that is not of this run."""

    url: str
    model: str
    endpoint: str
    """openai or triton"""
    load: tuple[LoadResult, ...]


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """What results.json holds."""

    schema: int
    tinier: str
    """Version"""
    created: str
    command: str
    seconds: float
    """Of work in all, also that of earlier calls"""
    seed: int
    recipe: dict[str, Any]
    """With all defaults"""
    base_content_hash: str
    environment: dict[str, Any]
    text_sha256: dict[str, str]
    variants: tuple[VariantResult, ...]
    """The base first"""
    pareto: Fronts
    choices: Choices | None
    endpoints: tuple[EndpointResult, ...] = ()
    failed: tuple[Failure, ...] = ()

    @property
    def base(self) -> VariantResult:
        return self.variants[0]

    def variant(self, name: str) -> VariantResult | None:
        """None for one that failed, or is not in the recipe."""
        return next((row for row in self.variants if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json", by_alias=True)
        return values

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        from tinier.report.notebook import results_html  # pages stand below (tests/test_imports.py)

        return results_html(self)

    @staticmethod
    def from_json(values: Any) -> "RunResults":
        """Raises InputError for values that are no results, or of another schema."""
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if isinstance(schema, int) and schema != SCHEMA:
            raise InputError(f"it has schema {schema}; this tinier reads {SCHEMA}. Run it again.")
        try:
            return _adapter().validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"it is not a tinier result: {f'{where}: ' if where else ''}{first['msg']}. Run it again."
            ) from None


@cache
def _adapter() -> TypeAdapter[RunResults]:
    return TypeAdapter(RunResults)


def assemble(
    run: PlannedRun,
    models: Mapping[str, Checkpoint],
    measurements: Mapping[str, Measured],
    *,
    environment: dict[str, Any],
    command: str,
    measuring_seconds: float,
    endpoints: Sequence[EndpointResult],
    failed: Sequence[Failure],
) -> RunResults:
    """The results of a run. failed: variants without a row, and why."""
    rows = [_row(run, name, models, measurements) for name in models]
    compressed = rows[1:]
    return RunResults(
        schema=SCHEMA,
        tinier=tinier.__version__,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command,
        seconds=round(measuring_seconds + sum(row.stage_seconds or 0.0 for row in compressed), 1),
        seed=run.recipe.seed,
        recipe=run.recipe.model_dump(mode="json", by_alias=True),
        base_content_hash=run.base.hash,
        environment=environment,
        text_sha256=run.parts.sha256,
        variants=tuple(rows),
        pareto=Fronts(
            throughput=_front(rows, [row.speedup for row in rows]),
            size=_front(rows, [row.shrinkage for row in rows]),
        ),
        choices=choose(
            [
                Candidate(
                    name=row.name, quality=row.retained_quality,
                    speedup=row.speedup, shrinkage=row.shrinkage,
                )
                for row in compressed
            ]
        ),
        endpoints=tuple(endpoints),
        failed=tuple(failed),
    )  # fmt: skip


def read_endpoints(run: Path) -> tuple[EndpointResult, ...]:
    """What `tinier bench URL --run` measured on servers and kept with this run."""
    path = run / _ENDPOINTS
    if not path.exists():
        return ()
    adapter = TypeAdapter(tuple[EndpointResult, ...])
    return adapter.validate_json(path.read_text("utf-8"))


def add_endpoint(run: Path, measured: EndpointResult) -> RunResults:
    """Keep the load on a server with a run, in place of an earlier one on the same server and model.

    Returns the run's results. Raises InputError for a folder that is no finished run's, OutputError for
    one in use.
    """

    def server(entry: EndpointResult) -> tuple[str, str, str]:
        return entry.url, entry.model, entry.endpoint

    results = load_results(run)
    with hold(run, run / ".lock"):
        kept = [entry for entry in read_endpoints(run) if server(entry) != server(measured)]
        results = replace(results, endpoints=(*kept, measured))
        values = results.to_json()
        write_atomically(run / _ENDPOINTS, json.dumps(values["endpoints"], indent=1) + "\n")
        write_atomically(run / _RESULTS, json.dumps(values, indent=1) + "\n")
    return results


def load_results(run: Path | str) -> RunResults:
    """results.json of a run folder. Raises InputError where there is none, or of another schema."""
    path = Path(run) / _RESULTS
    if not path.is_file():
        raise InputError(f"{run} has no results.json. Give the folder of a finished `tinier run`.")
    try:
        return RunResults.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it is not a tinier result: {error}. Run it again.") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _row(
    run: PlannedRun,
    name: str,
    models: Mapping[str, Checkpoint],
    measurements: Mapping[str, Measured],
) -> VariantResult:
    checkpoint, base = models[name], models[BASE]
    geometry = geometry_of(checkpoint)
    layout = checkpoint_layout(checkpoint)
    measured, manifest = measurements[name], checkpoint.manifest
    turns, is_base = measured.speed, name == BASE
    speed = turns.variant if turns else _base_speed(measurements)
    ratio = speed[-1].ratio_to_base if turns else None
    kl = measured.quality.kl
    candidate = Candidate(
        name=name,
        quality=0.0 if kl is None else math.exp(-kl),
        speedup=ratio.median if ratio else 1.0,
        shrinkage=base.disk_bytes / checkpoint.disk_bytes,
    )
    paths = turns.paths if turns else {}
    return VariantResult(
        name=name,
        from_=None if is_base else run.recipe.variants[name].from_,
        stage=None if is_base or manifest is None else manifest.stage,
        checkpoint=str(base.folder) if is_base else f"variants/{name}",
        content_hash=checkpoint.hash,
        precision=layout.label if layout else str(checkpoint.dtype).removeprefix("torch."),
        layers=geometry.layers,
        parameters=geometry.parameters,
        disk_bytes=checkpoint.disk_bytes,
        weight_bytes=checkpoint.weight_bytes,
        bits_per_weight=8 * checkpoint.weight_bytes / geometry.parameters,
        quality=measured.quality,
        mmlu=measured.mmlu,
        memory=measured.memory,
        speed=speed,
        serving=measured.serving,
        speedup=candidate.speedup,
        shrinkage=candidate.shrinkage,
        retained_quality=candidate.quality,
        collapsed=candidate.collapsed,
        stage_seconds=manifest.seconds if manifest else None,
        notes=tuple(
            f"no fast path on this device: {path}" for path, fast in paths.items() if not fast
        ),
        warnings=(
            *(manifest.warnings if manifest else []),
            *(["its logits are not numbers"] if kl is None else []),
        ),
        long=measured.long,
        own_text=measured.own_text,
        draft=measured.draft,
        tasks=measured.tasks,
        changes={} if is_base else _changes(measurements[BASE], measured),
    )


def _changes(base: Measured, variant: Measured) -> dict[str, PairedChange]:
    found = task_changes(base.tasks, variant.tasks)
    if base.mmlu and variant.mmlu:
        found["mmlu"] = compare_answers(base.mmlu.answers, variant.mmlu.answers)
    return found


def _base_speed(measurements: Mapping[str, Measured]) -> tuple[SpeedResult, ...]:
    """The base's own figures: the median over all its turns, and their whole spread."""
    turns = [m.speed.base for m in measurements.values() if m.speed]
    return tuple(_merged(same_workload) for same_workload in zip(*turns, strict=True))


def _merged(turns: Sequence[SpeedResult]) -> SpeedResult:
    merged = {}
    for figure in fields(SpeedResult):
        found = [getattr(turn, figure.name) for turn in turns]
        if all(isinstance(one, Statistic) for one in found):
            merged[figure.name] = Statistic(
                median=statistics.median(one.median for one in found),
                lowest=min(one.lowest for one in found),
                highest=max(one.highest for one in found),
            )
    return replace(turns[0], **merged)  # type: ignore[arg-type]  # those fields are statistics


def _front(rows: Sequence[VariantResult], gains: Sequence[float]) -> tuple[str, ...]:
    points = [(gain, row.retained_quality) for gain, row in zip(gains, rows, strict=True)]
    return tuple(rows[i].name for i in pareto_front(points))
