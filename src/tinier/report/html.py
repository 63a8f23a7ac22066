"""`report.html`: everything a run measured, in one file that needs no network.

Start at `write_html`. In: the results of one run or several, and their folders, whose manifests have each
layer's error and each step's divergence. The page is report.html, a template beside this file; Chart.js
draws (chart.umd.min.js, MIT).
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tinier.checkpoint import write_atomically
from tinier.fitting import load_fit
from tinier.fitting.results import Point
from tinier.recipe import RunResults, VariantResult
from tinier.report.choices import choices_text
from tinier.report.fitted import fit_text
from tinier.report.table import answered, answered_names

# key, label, what it is, digits, whether it is shown at first, axis (and which), whether lower is better
_COLUMNS: tuple[tuple[str, str, str, int, bool, str | None, str | None, bool], ...] = (
    ("precision", "precision", "How weights and activations are stored", 0, True, None, None, False),
    ("layers", "layers", "Decoder layers", 0, True, None, None, False),
    ("bits", "bits/weight", "All stored tensors over all parameters", 2, True, None, None, True),
    ("size", "size MB", "Files of the model", 1, True, "size, MB", "x", True),
    ("share", "size %", "Of the base model's", 0, True, None, None, True),
    ("quality", "quality %", "exp(-KL): likelihood per token of the base's text that is left", 1, True,
     "retained quality, %", "y", False),
    ("perplexity", "perplexity", "On held-out text", 2, True, "perplexity", "y", True),
    ("kl", "KL", "From the base, nats per token, ± standard error", 4, True, "KL, nats per token", "y",
     True),
    ("top1", "top-1 %", "Tokens of which the likeliest is the base's", 1, True, "top-1 agreement, %",
     "y", False),
    ("long", "KL, long", "On longer windows", 4, False, "KL on longer windows", "y", True),
    ("own", "KL, own text", "Along what the model writes greedily", 4, False, "KL along its own text", "y",
     True),
    ("mmlu", "MMLU %", "± binomial standard error", 1, True, "MMLU, %", "y", False),
    ("throughput", "tok/s", "Output tokens a second at the largest concurrency", 1, True,
     "throughput, tok/s", "x", False),
    ("speedup", "×base", "Throughput over the base's, by turns", 2, True, "throughput, × the base's", "x",
     False),
    ("latency", "latency ms", "Of a request at the smallest concurrency", 0, True, "latency, ms", "x",
     True),
    ("ttft", "TTFT ms", "To the first token, at the smallest concurrency", 0, False,
     "time to first token, ms", "x", True),
    ("itl", "ITL ms", "Between two tokens, at the smallest concurrency", 2, False, "between tokens, ms",
     "x", True),
    ("weights", "weights MB", "As loaded", 0, False, None, None, True),
    ("peak", "peak MB", "Memory of a process that serves the load", 0, True, "memory serving, MB", "x",
     True),
    ("seconds", "stage s", "What making it took", 0, False, None, None, True),
)  # fmt: skip
_ERRORS = {"kl": "kl_error", "mmlu": "mmlu_error"}


class Run(NamedTuple):
    """A finished run."""

    results: RunResults
    folder: Path

    @property
    def label(self) -> str:
        return self.folder.name


def write_html(runs: Sequence[Run], path: Path) -> Path:
    """Write the page of one run, or of several beside each other; returns its path."""
    source = files("tinier.report")
    page = source.joinpath("report.html").read_text("utf-8")
    # nothing in the data may end the script that holds it
    data = json.dumps(page_data(runs), allow_nan=False).replace("<", "\\u003c")
    chart = source.joinpath("chart.umd.min.js").read_text("utf-8")
    page = page.replace("/*CHART*/", chart, 1).replace("/*DATA*/", data, 1)
    write_atomically(path, page)
    return path


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows, as plain values."""
    bases = list(dict.fromkeys(str(run.results.recipe["base"]) for run in runs))
    rows = [
        row for index, run in enumerate(runs) for row in _rows(index, run, several=len(runs) > 1)
    ]
    fitted = [(run, found) for run in runs if (found := load_fit(run.folder)) is not None]
    lines = []
    for run, found in fitted:
        label = f"{run.label}: " if len(runs) > 1 else ""
        lines += [label + line for line in fit_text(found).splitlines()]
    predicted = [_predicted(point, run) for run, found in fitted for point in found.front]
    first = runs[0].results
    return {
        "title": ", ".join(bases),
        "about": f"{len(rows)} models, measured by tinier {first.tinier} on {_machine(first)}, "
        f"{first.created[:10]}. Every figure is a measurement of this run, none is copied.",
        "columns": [_name_column(), *map(_column, _COLUMNS), *_task_columns(runs)],
        "rows": rows,
        "predicted": [point for point in predicted if point],
        "found": lines or [text for run in runs for text in _choices(run)],
        "notes": [note for run in runs for note in _notes(run)],
        "spreads": _spreads(runs, rows),
        "runs": [
            {"index": i, "label": run.label, "command": run.results.command,
             "environment": _environment(run.results)}
            for i, run in enumerate(runs)
        ],
    }  # fmt: skip


def _name_column() -> dict[str, Any]:
    return {"key": "name", "label": "variant", "title": "Its name in the recipe", "text": True,
            "shown": True, "digits": 0, "axis": None}  # fmt: skip


def _column(column: tuple[Any, ...]) -> dict[str, Any]:
    key, label, title, digits, shown, axis, side, lower = column
    return {
        "key": key, "label": label, "title": title, "digits": digits, "shown": shown, "axis": axis,
        "side": side, "lower": lower, "text": key == "precision", "error": _ERRORS.get(key),
    }  # fmt: skip


def _task_columns(runs: Sequence[Run]) -> list[dict[str, Any]]:
    labels = {key: label for run in runs for key, label in answered_names(run.results).items()}
    lower = {
        f"{task.name}/{task.main}"
        for run in runs
        for task in run.results.base.tasks
        if not task.metrics[task.main].higher_is_better
    }
    return [
        {
            "key": key, "label": label, "title": f"Task {key}, ± standard error", "digits": 1,
            "shown": True, "axis": label, "side": "y", "lower": key in lower, "text": False,
            "error": f"{key}/error",
        }
        for key, label in labels.items()
        if key != "mmlu"
    ]  # fmt: skip


def _task_values(row: VariantResult) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for task in row.tasks:
        key = f"{task.name}/{task.main}"
        value, error = answered(row, key) or (None, None)
        found |= {key: value, f"{key}/error": error}
    return found


def _machine(results: RunResults) -> str:
    environment = results.environment
    return str(environment.get("gpu") or f"{environment['cpu']}, {environment['cpu_cores']} cores")


def _rows(index: int, run: Run, *, several: bool) -> list[dict[str, Any]]:
    found = load_fit(run.folder)
    winner = found.winner if found else None
    return [
        _row(index, run, row, several=several) | {"chosen": row.name == winner}
        for row in run.results.variants
    ]


def _row(index: int, run: Run, row: VariantResult, *, several: bool) -> dict[str, Any]:
    quality, mmlu, alone, busy = row.quality, row.mmlu, row.speed[0], row.speed[-1]
    manifest = _manifest(run, row)
    label = f"{run.label}/{row.name}" if several else row.name
    return {
        "run": index,
        "name": label,
        "label": label,
        "precision": row.precision,
        "layers": row.layers,
        "bits": row.bits_per_weight,
        "size": row.disk_bytes / 1e6,
        "share": 100 / row.shrinkage,
        "quality": 100 * row.retained_quality,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "kl_error": quality.kl_stderr,
        "top1": _times(quality.top1_agreement, 100),
        "long": row.long.kl if row.long else None,
        "own": row.own_text.kl if row.own_text else None,
        "mmlu": 100 * mmlu.accuracy if mmlu else None,
        "mmlu_error": 100 * mmlu.stderr if mmlu else None,
        "subjects": mmlu.subjects if mmlu else None,
        "throughput": busy.output_tokens_per_s.median,
        "speedup": row.speedup,
        "latency": alone.latency_ms.median,
        "ttft": alone.ttft_ms.median,
        "itl": alone.itl_ms.median,
        "weights": row.memory.weights_bytes / 1e6,
        "peak": row.memory.peak_bytes / 1e6,
        "seconds": row.stage_seconds,
        "collapsed": row.collapsed,
        "mark": "†" if row.collapsed else "",
        "why": "quality collapsed" if row.collapsed else "",
        "recipe": _recipe_of(run.results, row.name),
        "heat": _heat(manifest),
        "training": _training(manifest),
    } | _task_values(row)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _manifest(run: Run, row: VariantResult) -> dict[str, Any]:
    """What the stage wrote; empty for the base, and where the checkpoint was moved away."""
    path = run.folder / row.checkpoint / "tinier.json"
    if row.stage is None or not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return values


def _heat(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Signal over noise by kind of linear layer and decoder layer."""
    found: dict[str, dict[int, dict[str, float | None]]] = {}
    for name, measures in manifest.get("layers", {}).items():
        parts = name.split(".", 3)
        if len(parts) == 4 and parts[:2] == ["model", "layers"] and measures:
            found.setdefault(parts[3], {})[int(parts[2])] = measures
    if not found:
        return None
    layers = sorted({index for by_layer in found.values() for index in by_layer})
    values = {
        kind: [[found[module].get(i, {}).get(kind) for i in layers] for module in found]
        for kind in ("output_snr_db", "snr_db")
    }
    return {"modules": list(found), "layers": layers, "values": values}


def _training(manifest: dict[str, Any]) -> list[tuple[int, float]] | None:
    heldout = manifest.get("measures", {}).get("heldout_kl")
    return sorted((int(step), kl) for step, kl in heldout.items()) if heldout else None


def _recipe_of(results: RunResults, name: str) -> str | None:
    """The variants that lead to one, as a recipe's YAML."""
    recipe, needed, todo = results.recipe, dict[str, Any](), [name]
    while todo:
        variant = recipe["variants"].get(todo.pop())
        if variant is None:
            continue
        own = next(n for n, v in recipe["variants"].items() if v is variant)
        needed[own] = {key: value for key, value in variant.items() if value is not None}
        todo.append(variant["from"])
    if not needed:
        return None
    kept = {key: recipe[key] for key in ("base", "revision", "seed", "device", "text")}
    text: str = yaml.safe_dump(kept | {"variants": dict(reversed(needed.items()))}, sort_keys=False)
    return text


def _spreads(runs: Sequence[Run], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars: lowest, median and highest of each workload; percentiles of each load on a server."""
    variants = [row for run in runs for row in run.results.variants]
    names = [row["label"] for row in rows]
    found = []
    for index in range(min(len(variant.speed) for variant in variants)):
        speeds = [variant.speed[index] for variant in variants]
        load = speeds[0].workload
        what = f"{load.concurrency} at once, {load.input_length} in, {load.output_length} out"
        for label, figures in (
            ("latency", [speed.latency_ms for speed in speeds]),
            ("time to first token", [speed.ttft_ms for speed in speeds]),
            ("between tokens", [speed.itl_ms for speed in speeds]),
        ):
            series = [
                {"label": "lowest", "values": [figure.lowest for figure in figures]},
                {"label": "median", "values": [figure.median for figure in figures]},
                {"label": "highest", "values": [figure.highest for figure in figures]},
            ]
            found.append({"label": f"{label}, {what}", "names": names, "series": series, "unit": "ms",
                          "text": "In the engine's own process; over the repeats."})  # fmt: skip
    served = [(n, v.serving) for n, v in zip(names, variants, strict=True) if v.serving]
    for index in range(min((len(loads) for _, loads in served), default=0)):
        results = [loads[index] for _, loads in served]
        for label, percentiles in (
            ("latency", [result.latency_ms for result in results]),
            ("time to first token", [result.ttft_ms for result in results]),
            ("between tokens", [result.itl_ms for result in results]),
        ):
            series = [
                {"label": p, "values": [of[p] for of in percentiles]}
                for p in ("p50", "p90", "p95", "p99")
            ]
            found.append({"label": f"{label} over HTTP, {results[0].load.name}",
                          "names": [name for name, _ in served], "series": series, "unit": "ms",
                          "text": "Streamed requests, by AIPerf; percentiles over requests."})  # fmt: skip
    return found


def _predicted(point: Point, run: Run) -> dict[str, Any] | None:
    if point.kind != "predicted":
        return None
    rate = run.results.base.speed[-1].output_tokens_per_s.median
    return {
        "label": f"predicted: {point.name}", "precision": "not made", "size": point.size / 1e6,
        "quality": 100 * point.quality, "throughput": point.throughput,
        "speedup": point.throughput / rate, "itl": point.latency, "peak": point.memory / 1e6,
    }  # fmt: skip


def _choices(run: Run) -> list[str]:
    return [text.replace("**", "") for text in choices_text(run.results)]


def _notes(run: Run) -> list[str]:
    notes = [
        f"{row.name}: {text}"
        for row in run.results.variants
        for text in (*row.notes, *row.warnings)
    ]
    failed = [f"failed: {f.variant} ({f.what}): {f.error}" for f in run.results.failed]
    return [*failed, *_once(notes)]


def _once(notes: list[str]) -> list[str]:
    """Notes that several variants share, once."""
    by_text: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        by_text.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in by_text.items()]


def _environment(results: RunResults) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in results.environment.items():
        if isinstance(value, dict):
            pairs.append((name, ", ".join(f"{k} {v}" for k, v in value.items())))
        elif value is not None:
            pairs.append((name, str(value)))
    pairs.append(("held-out text", f"{results.base.quality.tokens} tokens"))
    pairs.append(("seed", str(results.seed)))
    pairs.append(("seconds of work", f"{results.seconds:.0f}"))
    return [(name.replace("_", " "), value) for name, value in pairs]
