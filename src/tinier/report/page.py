"""`report.md`: the table, the pictures, the choices, and what it was measured on."""

from pathlib import Path

from tinier.benchmark import TARGETS
from tinier.checkpoint import write_atomically
from tinier.evaluation.paired import NOISE
from tinier.recipe import RunResults
from tinier.report.choices import choices_text
from tinier.report.html import Run, write_html
from tinier.report.plots import draw_pareto
from tinier.report.table import (
    change_rows,
    csv_table,
    load_rows,
    markdown,
    markdown_table,
    quality_rows,
    speed_rows,
    target_notes,
)


def write_report(results: RunResults, folder: Path | str) -> Path:
    """Write report.html, report.md, table.csv and the pictures into the run folder; returns the path of
    report.html."""
    folder = Path(folder)
    draw_pareto(results, folder)
    write_atomically(folder / "report.md", _page(results))
    write_atomically(folder / "table.csv", csv_table(results))
    return write_html([Run(results, folder)], folder / "report.html")


def footnotes(results: RunResults) -> list[str]:
    """What the marks in the table mean, for the marks that are there."""
    notes = []
    if any(row.collapsed for row in results.variants):
        notes.append("† quality collapsed: less than half of the likelihood per token is left.")
    if any(change.is_noise for row in results.variants for change in row.changes.values()):
        notes.append(
            "~ the difference to the base may be chance: McNemar's test over the same questions, "
            f"p > {NOISE}."
        )
    for row in results.variants:
        notes += [f"\\* {row.name}: {note}" for note in row.notes]
    warned: dict[str, list[str]] = {}
    for row in results.variants:
        for warning in row.warnings:
            warned.setdefault(warning, []).append(row.name)
    notes += [f"{', '.join(names)}: {warning}" for warning, names in warned.items()]
    for failure in results.failed:
        notes.append(f"{failure.variant} failed ({failure.what}): {failure.error}")
    return notes


def _page(results: RunResults) -> str:
    environment = results.environment
    quality = results.recipe["measure"]["quality"]
    speed = results.base.speed[-1]
    versions = environment["versions"]
    lines = [
        f"# {results.recipe['base']}",
        "",
        markdown_table(results),
        "",
        *[f"{note}  " for note in footnotes(results)],
        "",
        "![quality against throughput](pareto-throughput.svg)",
        "![quality against size](pareto-size.svg)",
        "",
        *[f"- {choice}" for choice in choices_text(results)],
        "",
        "## Quality",
        "",
        markdown(*quality_rows(results), text_columns=2),
        "",
        "Standard errors are over windows. Its own text: what the variant writes greedily; the base's "
        "divergence there.",
        "",
        *_answers(results),
        "## Speed",
        "",
        markdown(*speed_rows(results), text_columns=1),
        "",
        *_served(results),
        "## How it was measured",
        "",
        f"- {environment.get('gpu') or environment['cpu']}, {environment['cpu_cores']} cores; "
        f"Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, tinier {results.tinier} "
        f"(commit {environment['commit'] or 'unknown'}).",
        f"- Perplexity, KL (nats per token, against the base) and top-1 agreement: "
        f"{results.base.quality.tokens} tokens of held-out text in windows of "
        f"{quality['length']}. Retained quality is exp(-KL).",
        f"- Speed: {speed.workload.input_length} tokens in, {speed.workload.output_length} out, medians "
        f"of {speed.repeats} repeats; each ratio against the base model "
        "in the same run, by turns.",
        "- Memory: weights as loaded, and the peak of a fresh process that serves the same load.",
        f"- Command: `{results.command}`; seed {results.seed}; {results.seconds:.0f} s of work.",
        "",
    ]
    return "\n".join(lines)


def _answers(results: RunResults) -> list[str]:
    """Questions whose answers changed, where some were asked."""
    head, rows = change_rows(results)
    if not rows:
        return []
    return [
        "## Answers against the base's, in pairs",
        "",
        markdown(head, rows, text_columns=2),
        "",
        "lost: right in the base alone; gained: right in the variant alone. The standard error is of the "
        "difference; p is McNemar's exact test.",
        "",
    ]


def _served(results: RunResults) -> list[str]:
    """The loads on servers, where some were measured."""
    head, rows = load_rows(results)
    if not rows:
        return []
    return [
        "## Load on a server",
        "",
        markdown(head, rows, text_columns=2),
        "",
        *[f"- {note}" for note in target_notes(results)],
        "",
        "Streamed requests over HTTP, by AIPerf. Targets: "
        + ", ".join(f"{use} {limit:g} ms" for use, limit in TARGETS.items())
        + ".",
        "",
    ]
