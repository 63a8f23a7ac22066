"""From measurements to `results.json`: one row a variant, the Pareto fronts, the three choices.

Start at `assemble`. The schema is versioned; `docs/results.md` describes it.
"""

import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tinier
from tinier.checkpoint import Checkpoint, hold, write_atomically
from tinier.errors import InputError
from tinier.families import checkpoint_layout, geometry_of
from tinier.recipe.plan import PlannedRun
from tinier.recipe.schema import BASE
from tinier.search import Candidate, choose, pareto_front

SCHEMA = 1
_RESULTS, _ENDPOINTS = "results.json", "endpoints.json"


def assemble(
    run: PlannedRun,
    models: dict[str, Checkpoint],
    measurements: dict[str, dict[str, Any]],
    *,
    environment: dict[str, Any],
    command: str,
    measuring_seconds: float,
    endpoints: list[dict[str, Any]],
    failed: list[dict[str, str]],
) -> dict[str, Any]:
    """The results of a run as plain JSON values. failed: variants without a row, and why."""
    rows = [_row(run, name, models, measurements) for name in models]
    compressed = rows[1:]
    candidates = [
        Candidate(
            name=row["name"],
            quality=row["retained_quality"],
            speedup=row["speedup"],
            shrinkage=row["shrinkage"],
        )
        for row in compressed
    ]
    choices = choose(candidates)
    return {
        "schema": SCHEMA,
        "tinier": tinier.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "seconds": round(
            measuring_seconds + sum(row["stage_seconds"] or 0.0 for row in compressed), 1
        ),
        "seed": run.recipe.seed,
        "recipe": run.recipe.model_dump(mode="json", by_alias=True),
        "base_content_hash": run.base.hash,
        "environment": environment,
        "text_sha256": run.parts.sha256,
        "variants": rows,
        "pareto": {
            "throughput": _front(rows, "speedup"),
            "size": _front(rows, "shrinkage"),
        },
        "choices": asdict(choices) if choices else None,
        "endpoints": endpoints,
        "failed": failed,
    }


def read_endpoints(run: Path) -> list[dict[str, Any]]:
    """What `tinier bench URL --run` measured on servers and kept with this run."""
    path = run / _ENDPOINTS
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return found


def add_endpoint(run: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Keep the load on a server with a run, in place of an earlier one on the same server and model.

    measured: as `tinier bench URL --json` prints. Returns the run's results. Raises InputError for a
    folder that is no finished run's, OutputError for one in use.
    """

    def server(entry: dict[str, Any]) -> tuple[str, str, str]:
        return entry["url"], entry["model"], entry["endpoint"]

    results = load_results(run)
    with hold(run, run / ".lock"):
        kept = [entry for entry in read_endpoints(run) if server(entry) != server(measured)]
        results["endpoints"] = [*kept, measured]
        for name, values in ((_ENDPOINTS, results["endpoints"]), (_RESULTS, results)):
            write_atomically(run / name, json.dumps(values, indent=1) + "\n")
    return results


def load_results(run: Path) -> dict[str, Any]:
    """results.json of a run folder. Raises InputError where there is none, or of another schema."""
    path = run / _RESULTS
    if not path.is_file():
        raise InputError(f"{run} has no results.json. Give the folder of a finished `tinier run`.")
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = results["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a tinier result: {error!r}") from None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}; this tinier reads {SCHEMA}. Run it again.")
    return results


def _row(
    run: PlannedRun,
    name: str,
    models: dict[str, Checkpoint],
    measurements: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    checkpoint, base = models[name], models[BASE]
    geometry = geometry_of(checkpoint)
    layout = checkpoint_layout(checkpoint)
    measured = measurements[name]
    manifest = checkpoint.manifest
    speed = _base_speed(measurements) if name == BASE else measured["speed"]["variant"]
    paths = {} if name == BASE else measured["speed"]["paths"]
    speedup = 1.0 if name == BASE else speed[-1]["ratio_to_base"]["median"]
    kl = measured["quality"]["kl"]
    candidate = Candidate(
        name=name,
        # the likelihood, per token of the base's own text, that is left: exp(-KL)
        quality=0.0 if kl is None else math.exp(-kl),
        speedup=speedup,
        shrinkage=base.disk_bytes / checkpoint.disk_bytes,
    )
    return {
        "name": name,
        "from": None if name == BASE else run.recipe.variants[name].from_,
        "stage": None if name == BASE or manifest is None else manifest.stage,
        "checkpoint": str(base.folder) if name == BASE else f"variants/{name}",
        "content_hash": checkpoint.hash,
        "precision": layout.label if layout else str(checkpoint.dtype).removeprefix("torch."),
        "layers": geometry.layers,
        "parameters": geometry.parameters,
        "disk_bytes": checkpoint.disk_bytes,
        "weight_bytes": checkpoint.weight_bytes,
        "bits_per_weight": 8 * checkpoint.weight_bytes / geometry.parameters,
        "quality": measured["quality"],
        "mmlu": measured.get("mmlu"),
        "memory": measured["memory"],
        "speed": speed,
        "serving": measured.get("serving"),
        "speedup": candidate.speedup,
        "shrinkage": candidate.shrinkage,
        "retained_quality": candidate.quality,
        "collapsed": candidate.collapsed,
        "stage_seconds": manifest.seconds if manifest else None,
        "notes": [
            f"no fast path on this device: {path}" for path, fast in paths.items() if not fast
        ],
        "warnings": [
            *(manifest.warnings if manifest else []),
            *(["its logits are not numbers"] if kl is None else []),
        ],
    }


def _base_speed(measurements: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The base's own figures: the median over all its turns, and their whole spread."""
    turns = [m["speed"]["base"] for m in measurements.values() if "speed" in m]
    merged = []
    for same_workload in zip(*turns, strict=True):
        row = dict(same_workload[0])
        for figure, value in row.items():
            if isinstance(value, dict) and "median" in value:
                row[figure] = {
                    "median": statistics.median(t[figure]["median"] for t in same_workload),
                    "lowest": min(t[figure]["lowest"] for t in same_workload),
                    "highest": max(t[figure]["highest"] for t in same_workload),
                }
        merged.append(row)
    return merged


def _front(rows: list[dict[str, Any]], gain: str) -> list[str]:
    points = [(row[gain], row["retained_quality"]) for row in rows]
    return [rows[i]["name"] for i in pareto_front(points)]
