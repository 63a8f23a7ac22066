"""`report.md`: the table, the pictures, the choices, and what it was measured on."""

from pathlib import Path
from typing import Any

from tinier.benchmark import TARGETS
from tinier.checkpoint import write_atomically
from tinier.report.choices import choices_text
from tinier.report.html import Run, write_html
from tinier.report.plots import draw_pareto
from tinier.report.table import (
    csv_table,
    load_rows,
    markdown,
    markdown_table,
    speed_rows,
    target_notes,
)


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html, report.md, table.csv and the pictures into the run folder; returns the path of
    report.html."""
    draw_pareto(results, folder)
    write_atomically(folder / "report.md", _page(results))
    write_atomically(folder / "table.csv", csv_table(results))
    return write_html([Run(results, folder)], folder / "report.html")


def footnotes(results: dict[str, Any]) -> list[str]:
    """What the marks in the table mean, for the marks that are there."""
    rows = results["variants"]
    notes = []
    if any(row["collapsed"] for row in rows):
        notes.append("† quality collapsed: less than half of the likelihood per token is left.")
    for row in rows:
        notes += [f"\\* {row['name']}: {note}" for note in row["notes"]]
        notes += [f"{row['name']}: {warning}" for warning in row["warnings"]]
    for failure in results.get("failed", []):
        notes.append(f"{failure['variant']} failed ({failure['what']}): {failure['error']}")
    return notes


def _page(results: dict[str, Any]) -> str:
    environment = results["environment"]
    quality = results["recipe"]["measure"]["quality"]
    speed = results["variants"][0]["speed"][-1]["workload"]
    versions = environment["versions"]
    lines = [
        f"# {results['recipe']['base']}",
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
        "## Speed",
        "",
        markdown(*speed_rows(results), text_columns=1),
        "",
        *_served(results),
        "## How it was measured",
        "",
        f"- {environment.get('gpu') or environment['cpu']}, {environment['cpu_cores']} cores; "
        f"Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, tinier {results['tinier']} "
        f"(commit {environment['commit'] or 'unknown'}).",
        f"- Perplexity, KL (nats per token, against the base) and top-1 agreement: "
        f"{results['variants'][0]['quality']['tokens']} tokens of held-out text in windows of "
        f"{quality['length']}. Retained quality is exp(-KL).",
        f"- Speed: {speed['input_length']} tokens in, {speed['output_length']} out, medians of "
        f"{results['variants'][0]['speed'][-1]['repeats']} repeats; each ratio against the base model "
        "in the same run, by turns.",
        "- Memory: weights as loaded, and the peak of a fresh process that serves the same load.",
        f"- Command: `{results['command']}`; seed {results['seed']}; {results['seconds']:.0f} s of work.",
        "",
    ]
    return "\n".join(lines)


def _served(results: dict[str, Any]) -> list[str]:
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
