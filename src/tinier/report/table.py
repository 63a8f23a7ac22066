"""The final table: one row a variant, every number measured."""

import csv
import io
from typing import Any

from tinier.benchmark import Load

Results = dict[str, Any]
LOAD_HEAD = ["load", "requests/s", "tok/s", "quantity", "mean", "p50", "p90", "p95", "p99"]


def table_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of text, base first."""
    speed = results["variants"][0]["speed"]
    alone, busy = (speed[i]["workload"]["concurrency"] for i in (0, -1))
    has_mmlu = any(row["mmlu"] for row in results["variants"])
    head = ["variant", "precision", "layers", "bits/weight", "size MB", "size %", "perplexity", "KL",
            "top-1 %", *(["MMLU %"] if has_mmlu else []),
            f"tok/s at {busy}", "×base", f"latency ms at {alone}", "weights MB", "peak MB"]  # fmt: skip
    rows = [_row(row, has_mmlu) for row in results["variants"]]
    failed = dict.fromkeys(f["variant"] for f in results["failed"])
    return head, rows + [[name, "failed", *["–"] * (len(head) - 2)] for name in failed]


def speed_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the speed of every variant under every workload."""
    head = ["variant", "in flight", "latency ms", "TTFT ms", "ITL ms", "tok/s", "spread",
            "requests/s", "×base"]  # fmt: skip
    rows = []
    for variant in results["variants"]:
        for speed in variant["speed"]:
            rate, ratio = speed["output_tokens_per_s"], speed["ratio_to_base"]
            rows.append(
                [
                    variant["name"],
                    str(speed["workload"]["concurrency"]),
                    f"{speed['latency_ms']['median']:.0f}",
                    f"{speed['ttft_ms']['median']:.0f}",
                    f"{speed['itl_ms']['median']:.1f}",
                    f"{rate['median']:.1f}",
                    f"{rate['lowest']:.1f}–{rate['highest']:.1f}",
                    f"{speed['requests_per_s']['median']:.2f}",
                    f"{ratio['median']:.2f}" if ratio else "1.00",
                ]
            )
    return head, rows


def load_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the loads on servers: tinier's of each variant, then any others."""
    head = ["server", *LOAD_HEAD]
    rows = []
    for name, loads in _servers(results):
        for result in loads:
            for i, row in enumerate(one_load(result)):
                rows.append([name if i == 0 else "", *row])
    return head, rows


def target_notes(results: Results) -> list[str]:
    """For each load on a server, which targets it met."""
    return [
        f"{name}, {one_target_note(result)}"
        for name, loads in _servers(results)
        for result in loads
    ]


def one_load(result: dict[str, Any]) -> list[list[str]]:
    """Rows under LOAD_HEAD of one load (tinier.benchmark.LoadResult)."""
    rates = [f"{result['requests_per_s']:.4g}", f"{result['output_tokens_per_s']:.4g}"]
    starts = [[Load(**result["load"]).name, *rates], ["", "", ""], ["", "", ""]]
    figures = {"ttft_ms": "TTFT ms", "itl_ms": "ITL ms", "latency_ms": "latency ms"}
    return [
        [*start, label, *(f"{value:.4g}" for value in result[figure].values())]
        for start, (figure, label) in zip(starts, figures.items(), strict=True)
    ]


def one_target_note(result: dict[str, Any]) -> str:
    met = [f"{use} {'met' if ok else 'missed'}" for use, ok in result["targets_met"].items()]
    failed = f"; {result['errors']} requests failed" if result["errors"] else ""
    return f"{Load(**result['load']).name}: 95 % within the target of {', '.join(met)}{failed}"


def _servers(results: Results) -> list[tuple[str, list[dict[str, Any]]]]:
    own = [(row["name"], row["serving"]) for row in results["variants"] if row.get("serving")]
    others = [(f"{e['model']} at {e['url']}", e["load"]) for e in results.get("endpoints", [])]
    return own + others


def markdown(head: list[str], rows: list[list[str]], *, text_columns: int) -> str:
    """A markdown table; columns after the first `text_columns` are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def markdown_table(results: Results) -> str:
    """The final table as markdown."""
    return markdown(*table_rows(results), text_columns=2)


def csv_table(results: Results) -> str:
    """The final table as CSV."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(
        [table_rows(results)[0], *table_rows(results)[1]]
    )
    return written.getvalue()


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _row(row: dict[str, Any], has_mmlu: bool) -> list[str]:
    quality, mmlu, busy, alone = row["quality"], row["mmlu"], row["speed"][-1], row["speed"][0]
    mark = " †" if row["collapsed"] else ""
    slow = " *" if row["notes"] else ""
    cells = [
        row["name"] + mark,
        row["precision"],
        str(row["layers"]),
        f"{row['bits_per_weight']:.2f}",
        f"{row['disk_bytes'] / 1e6:.1f}",
        f"{100 / row['shrinkage']:.0f}",
        _number(quality["perplexity"], 2),
        _number(quality["kl"], 4),
        f"{100 * quality['top1_agreement']:.1f}",
    ]
    if has_mmlu:
        cells.append(f"{100 * mmlu['accuracy']:.1f} ± {100 * mmlu['stderr']:.1f}" if mmlu else "–")
    return [
        *cells,
        f"{busy['output_tokens_per_s']['median']:.1f}{slow}",
        f"{row['speedup']:.2f}",
        f"{alone['latency_ms']['median']:.0f}",
        f"{row['memory']['weights_bytes'] / 1e6:.0f}",
        f"{row['memory']['peak_bytes'] / 1e6:.0f}",
    ]
