"""Results as text for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tinier.advice import Advice, Finding
from tinier.checkpoint import Checkpoint, Manifest, StagePlan
from tinier.device import model_flops, pick_device
from tinier.evaluation import Comparison, DraftForecast
from tinier.evaluation.paired import NOISE
from tinier.families import geometry_of
from tinier.recipe import EndpointResult, RunResults
from tinier.report.choices import choices_text
from tinier.report.page import footnotes
from tinier.report.table import LOAD_HEAD, one_load, one_target_note, table_rows


def results_text(results: RunResults) -> str:
    """The final table, its notes and the three choices."""
    head, rows = table_rows(results)
    lines = [_table(head, rows, text_columns=2)]
    lines += [note.replace("\\*", "*") for note in footnotes(results)]
    lines += [choice.replace("**", "") for choice in choices_text(results)]
    return "\n".join(lines)


def size_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Layers, parameters, bytes on disk and effective bits per weight."""
    geometry = geometry_of(checkpoint)
    return {
        "layers": geometry.layers,
        "parameters": geometry.parameters,
        "disk_bytes": checkpoint.disk_bytes,
        "bits_per_weight": 8 * checkpoint.weight_bytes / geometry.parameters,
    }


def made_text(made: Checkpoint, source: Checkpoint) -> tuple[str, dict[str, Any]]:
    """What a stage made: a summary for people, and its manifest with sizes for `--json`."""
    manifest = made.manifest
    assert manifest is not None
    data = {
        "out": str(made.folder),
        "stage": manifest.stage,
        "parameters": manifest.parameters,
        "content_hash": made.hash,
        **size_of(made),
        "seconds": manifest.seconds,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "measures": manifest.measures,
        "per_layer": manifest.layers,
        "warnings": manifest.warnings,
    }
    lines = [
        f"{made.folder}: {data['layers']} layers, {_size(made.disk_bytes)} "
        f"({100 * made.disk_bytes / source.disk_bytes:.0f} % of {_size(source.disk_bytes)}), "
        f"{data['bits_per_weight']:.2f} bits per weight, {manifest.seconds:.1f} s"
    ]
    measured = {n: m.get("snr_db") for n, m in manifest.layers.items()}
    ratios = {n: ratio for n, ratio in measured.items() if ratio is not None}
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        mean = sum(ratios.values()) / len(ratios)
        lines.append(
            f"weights: {mean:.1f} dB SNR on average, worst {ratios[worst]:.1f} dB in {worst}"
        )
    if "dropped_layers" in manifest.measures:
        lines.append(f"dropped layers: {manifest.measures['dropped_layers']}")
    if "heldout_kl_before" in manifest.measures:
        before, after = (manifest.measures[f"heldout_kl_{when}"] for when in ("before", "after"))
        lines.append(f"held-out KL against the teacher: {before:.4f} before, {after:.4f} after")
    return "\n".join(lines + [f"warning: {w}" for w in manifest.warnings]), data


def exported_text(out: Path, manifest: Manifest) -> tuple[str, dict[str, Any]]:
    """What an export wrote and how it compares with its source."""
    kinds = (".safetensors", ".gguf", ".data")
    written = sum(path.stat().st_size for path in out.rglob("*") if path.suffix in kinds)
    data = {
        "out": str(out), "parameters": manifest.parameters, "weight_bytes": written,
        "seconds": manifest.seconds, "measures": manifest.measures, "warnings": manifest.warnings,
    }  # fmt: skip
    found = manifest.measures
    if "kl" in found:
        said = (
            f"KL {found['kl']:.1e} nats per token from its source and top-1 agreement "
            f"{100 * found['top_1']:.2f} % over {found['tokens']} tokens"
        )
    else:
        said = f"each tensor's numbers are within {found['largest_difference']:.1e} of its norm"
    lines = [f"{out}: {_size(written)} of weights, {manifest.seconds:.1f} s", f"read back: {said}"]
    return "\n".join(lines + [f"warning: {w}" for w in manifest.warnings]), data


def stage_text(plan: StagePlan, out: Path, device: str) -> tuple[str, dict[str, Any]]:
    """A planned stage, for `--dry-run`."""
    seconds = plan.estimated_seconds(model_flops(pick_device(device)))
    data: dict[str, Any] = {
        "stage": plan.stage,
        "inputs": {role: str(c.folder) for role, c in plan.inputs.items()},
        "parameters": plan.parameters,
        "out": str(out),
        "estimated_disk_bytes": plan.output_bytes,
        "estimated_memory_bytes": plan.memory_bytes,
        "estimated_seconds": round(seconds, 1),
    }
    lines = [f"{plan.stage} {' '.join(data['inputs'].values())} -> {out}"]
    lines += [f"  {name}: {value}" for name, value in plan.parameters.items()]
    lines += [
        f"  estimated: {_size(plan.output_bytes)} on disk, {_size(plan.memory_bytes)} of memory, "
        f"{seconds:.0f} s"
    ]
    return "\n".join(lines), data


def plan_text(plan: dict[str, Any]) -> str:
    """A planned run, for `--dry-run`."""
    rows = [
        [s["variant"], s["stage"], s["from"], _size(s["disk_bytes"]), _size(s["memory_bytes"]),
         f"{s['seconds']:.0f}"]
        for s in plan["stages"]
    ]  # fmt: skip
    head = ["variant", "stage", "from", "disk", "memory", "seconds"]
    return "\n".join(
        [
            f"base {plan['base']}: {plan['layers']} layers, {plan['parameters']:,} parameters",
            _table(head, rows, text_columns=3),
            f"in all about {_size(plan['estimated_disk_bytes'])} on disk, "
            f"{_size(plan['estimated_peak_memory_bytes'])} of memory "
            f"({_size(plan['free_memory_bytes'])} free on {plan['device']}), "
            f"{plan['estimated_seconds'] / 60:.0f} min with the measurements",
            f"would write {plan['out']}",
        ]
    )


def quality_text(data: dict[str, Any]) -> str:
    quality, mmlu = data["quality"], data["mmlu"]
    size = data["size"]
    lines = [
        f"{size['layers']} layers, {size['parameters']:,} parameters, {_size(size['disk_bytes'])} on "
        f"disk, {size['bits_per_weight']:.2f} bits per weight"
    ]
    if quality["perplexity"] is None:
        return "\n".join([*lines, "the logits of this model are not numbers"])
    lines.append(f"perplexity {quality['perplexity']:.4f} over {quality['tokens']} tokens")
    if quality["kl"] is not None:
        spread = f" ± {quality['kl_stderr']:.5f}" if quality["kl_stderr"] is not None else ""
        lines.append(
            f"against {data['against']}: KL {quality['kl']:.5f}{spread} nats per token, "
            f"top-1 agreement {100 * quality['top1_agreement']:.2f} %"
        )
    if mmlu:
        lines.append(
            f"MMLU by {mmlu['format']}, {mmlu['shots']}-shot: {100 * mmlu['accuracy']:.2f} ± "
            f"{100 * mmlu['stderr']:.2f} % of {mmlu['questions']} questions"
        )
        scores = mmlu["categories"] | mmlu["subjects"]
        lines += [f"  {name}: {100 * accuracy:.1f} %" for name, accuracy in scores.items()]
    for task in data["tasks"]:
        for name, metric in task["metrics"].items():
            error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}"
            lines.append(
                f"{task['name']}: {name} {metric['value']:.4f}{error}, {task['documents']} questions"
            )
    for name, change in data["changes"].items():
        noise = ": may be chance" if change["p_value"] > NOISE else ""
        lines.append(
            f"{name} against {data['against']}: {change['lost']} lost, {change['gained']} gained, "
            f"{100 * change['difference']:+.2f} ± {100 * change['stderr']:.2f} points, p = "
            f"{change['p_value']:.2g}{noise}"
        )
    return "\n".join(lines)


def comparison_text(comparison: Comparison, first: str, second: str) -> str:
    """Every layer's difference, the worst ones by name, and the divergence at the end."""
    lines = []
    if comparison.layers:
        rows = [
            [layer.name, _decibels(layer.layer_snr_db), f"{layer.added_error:.2e}",
             _decibels(layer.stream_snr_db)]
            for layer in comparison.layers
        ]  # fmt: skip
        head = ["layer", "alone, dB", "adds error", "piled up, dB"]
        lines.append(_table(head, rows, text_columns=1))
        worst = [f"{w.name} ({w.added_error:.1e})" for w in comparison.worst[:3] if w.added_error]
        lines.append(f"layers that hurt most: {', '.join(worst) or 'none'}")
    else:
        lines.append("the models have different layers, so only their ends are compared")
    quality = comparison.second
    lines.append(f"perplexity: {first} {_number(comparison.first.perplexity)}, "
                 f"{second} {_number(quality.perplexity)}")  # fmt: skip
    if quality.kl is not None and quality.top1_agreement is not None:
        lines.append(
            f"KL {quality.kl:.5f} nats per token, top-1 agreement "
            f"{100 * quality.top1_agreement:.2f} % over {quality.tokens} tokens"
        )
    return "\n".join(lines)


def draft_text(forecast: DraftForecast, draft: str) -> str:
    """How often a draft is right, and what it gains."""
    right = "it was only tried, since it does not pay here"
    if forecast.accepted is not None:
        right = f"{100 * forecast.accepted:.0f} % of what it proposed was right"
    return (
        f"{draft} says the same: greedy {100 * forecast.greedy:.1f} %, drawn at temperature 1 "
        f"{100 * forecast.drawn:.1f} % of {forecast.tokens} tokens (at most "
        f"{100 * forecast.overlap:.1f} %, one minus total variation)\n"
        f"as a draft, one greedy text at a time: {forecast.gain:.2f} × of "
        f"{forecast.tokens_per_s:.0f} tokens/s; {right}"
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "is not a number" if value is None else f"{value:.4f}"


def bench_text(data: dict[str, Any]) -> str:
    head = ["model", "in flight", "latency ms", "TTFT ms", "ITL ms", "tok/s", "requests/s", "×base"]
    figures = ["latency_ms", "ttft_ms", "itl_ms", "output_tokens_per_s", "requests_per_s"]
    rows = []
    for workload in data["speed"]:
        for name, result in workload.items():
            ratio = result["ratio_to_base"]
            rows.append(
                [name, str(result["workload"]["concurrency"])]
                + [f"{result[figure]['median']:.4g}" for figure in figures]
                + [f"{ratio['median']:.2f}" if ratio else "–"]
            )
    lines = [_table(head, rows, text_columns=1)]
    for name, memory in data["memory"].items():
        lines.append(
            f"{name}: weights {_size(memory['weights_bytes'])}, KV cache {_size(memory['kv_bytes'])}, "
            f"peak {_size(memory['peak_bytes'])}"
        )
    return "\n".join(lines)


def load_text(measured: EndpointResult) -> str:
    """Of `tinier bench URL`: a row for each quantity over its percentiles."""
    rows = [row for result in measured.load for row in one_load(result)]
    notes = [one_target_note(result) for result in measured.load]
    return "\n".join([_table(LOAD_HEAD, rows, text_columns=1), *notes])


def _table(head: list[str], rows: list[list[str]], *, text_columns: int) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(240, Console().width), highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def advice_text(found: Sequence[Advice], origin: str, lacks: Sequence[str]) -> str:
    """Ranked chains: figures, why, what speaks against each, and the commands of the first three."""
    head = ["", "chain", "weights GB", "memory GB", "ms/token", "tok/s", "×16 bit", "quality %"]
    rows = [
        [
            str(number), one.chain, f"{one.weight_bytes / 1e9:.2f}", f"{one.memory_bytes / 1e9:.2f}",
            f"{one.latency_ms:.2f}", f"{one.throughput:.0f}", f"{one.speedup:.2f}",
            "–" if one.quality is None else f"{100 * one.quality:.1f}",
        ]
        for number, one in enumerate(found, 1)
    ]  # fmt: skip
    lines = [_table(head, rows, text_columns=2), origin]
    if lacks:
        lines.append(f"This hardware has no {', no '.join(lacks)}.")
    for number, one in enumerate(found, 1):
        if one.against:
            lines.append(f"{number}. speaks against it: {'; '.join(one.against)}.")
    for number, one in enumerate(found[:3], 1):
        lines += ["", f"{number}. {one.chain}: {one.reason}.", *(f"   {c}" for c in one.commands)]
    return "\n".join(lines)


def findings_text(found: Sequence[Finding]) -> str:
    """One line a finding, and what to do under those that are not well."""
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    lines = []
    for finding in found:
        lines.append(
            f"{marks[finding.level]}  {finding.subject}: {finding.what.removesuffix('.')}."
        )
        if finding.remedy:
            lines.append(f"      → {finding.remedy}")
    return "\n".join(lines)
