"""The final table: one row a variant, every number measured."""

import csv
import io
from collections.abc import Sequence

from tinier.benchmark import LoadResult
from tinier.recipe import RunResults, VariantResult

LOAD_HEAD = ["load", "requests/s", "tok/s", "quantity", "mean", "p50", "p90", "p95", "p99"]


def table_rows(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of text, base first."""
    speed = results.base.speed
    alone, busy = (speed[i].workload.concurrency for i in (0, -1))
    asked, extra = answered_names(results), extra_divergences(results)
    drafts = ["×base as draft"] if any(row.draft for row in results.variants) else []
    head = ["variant", "precision", "layers", "bits/weight", "size MB", "size %", "perplexity", "KL",
            "top-1 %", *extra, *asked.values(),
            f"tok/s at {busy}", "×base", *drafts, f"latency ms at {alone}", "weights MB",
            "peak MB"]  # fmt: skip
    rows = [_row(row, extra, list(asked), drafts=bool(drafts)) for row in results.variants]
    failed = dict.fromkeys(failure.variant for failure in results.failed)
    return head, rows + [[name, "failed", *["–"] * (len(head) - 2)] for name in failed]


def extra_divergences(results: RunResults) -> list[str]:
    """Columns of divergence that were asked for beside the usual one."""
    found = []
    if any(row.long for row in results.variants):
        found.append(f"KL at {results.recipe['measure']['quality']['long']} tokens")
    if any(row.own_text for row in results.variants):
        found.append("KL, own text")
    return found


def answered_names(results: RunResults) -> dict[str, str]:
    """What questions were answered, as a column is called, by name among `VariantResult.changes`."""
    mmlu = next((row.mmlu for row in results.variants if row.mmlu), None)
    found = {}
    if mmlu is not None:
        found["mmlu"] = "MMLU %" if mmlu.format == "letters" else f"MMLU {mmlu.format} %"
    for task in results.base.tasks:
        # a perplexity is no share
        share = task.metrics[task.main].answers is not None
        found[f"{task.name}/{task.main}"] = f"{task.name} {'%' if share else task.main}"
    return found


def answered(row: VariantResult, name: str) -> tuple[float, float | None] | None:
    """A figure, shares in percent, and its standard error. name: of `answered_names`."""
    if name == "mmlu":
        return (100 * row.mmlu.accuracy, 100 * row.mmlu.stderr) if row.mmlu else None
    for task in row.tasks:
        metric = task.metrics.get(name.removeprefix(f"{task.name}/"))
        if metric is not None and name.startswith(f"{task.name}/"):
            times = 1 if metric.answers is None else 100
            return times * metric.value, None if metric.stderr is None else times * metric.stderr
    return None


def speed_rows(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the speed of every variant under every workload."""
    head = ["variant", "in flight", "latency ms", "TTFT ms", "ITL ms", "tok/s", "spread",
            "requests/s", "×base"]  # fmt: skip
    rows = []
    for variant in results.variants:
        for speed in variant.speed:
            rate, ratio = speed.output_tokens_per_s, speed.ratio_to_base
            rows.append(
                [
                    variant.name,
                    str(speed.workload.concurrency),
                    f"{speed.latency_ms.median:.0f}",
                    f"{speed.ttft_ms.median:.0f}",
                    f"{speed.itl_ms.median:.1f}",
                    f"{rate.median:.1f}",
                    f"{rate.lowest:.1f}–{rate.highest:.1f}",
                    f"{speed.requests_per_s.median:.2f}",
                    f"{ratio.median:.2f}" if ratio else "1.00",
                ]
            )
    return head, rows


def quality_rows(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of quality with standard errors over windows."""
    head = ["variant", "text", "tokens", "perplexity", "KL", "top-1 %"]
    rows = []
    for row in results.variants:
        for text, quality in (
            ("held-out", row.quality), ("longer windows", row.long), ("its own", row.own_text)
        ):  # fmt: skip
            if quality is None:
                continue
            perplexity, error = quality.perplexity, quality.nll_stderr
            # of exp(x): exp(x) times the error of x
            spread = None if perplexity is None or error is None else perplexity * error
            cells = [
                _spread(perplexity, spread, 2),
                _spread(quality.kl, quality.kl_stderr, 4),
                _spread(_percent(quality.top1_agreement), _percent(quality.top1_stderr), 1),
            ]
            rows.append([row.name, text, str(quality.tokens), *cells])
    return head, rows


def change_rows(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the answers of each variant against the base's."""
    head = ["variant", "questions", "lost", "gained", "difference %", "p"]
    labels = {name: label.removesuffix(" %") for name, label in answered_names(results).items()}
    rows = [
        [
            row.name, labels.get(name, name), str(change.lost), str(change.gained),
            f"{100 * change.difference:+.2f} ± {100 * change.stderr:.2f}", f"{change.p_value:.2g}",
        ]
        for row in results.variants
        for name, change in row.changes.items()
    ]  # fmt: skip
    return head, rows


def load_rows(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of the loads on servers: tinier's of each variant, then any others."""
    head = ["server", *LOAD_HEAD]
    rows = []
    for name, loads in _servers(results):
        for result in loads:
            for i, row in enumerate(one_load(result)):
                rows.append([name if i == 0 else "", *row])
    return head, rows


def target_notes(results: RunResults) -> list[str]:
    """For each load on a server, which targets it met."""
    return [
        f"{name}, {one_target_note(result)}"
        for name, loads in _servers(results)
        for result in loads
    ]


def one_load(result: LoadResult) -> list[list[str]]:
    """Rows under LOAD_HEAD of one load."""
    rates = [f"{result.requests_per_s:.4g}", f"{result.output_tokens_per_s:.4g}"]
    starts = [[result.load.name, *rates], ["", "", ""], ["", "", ""]]
    figures = {"TTFT ms": result.ttft_ms, "ITL ms": result.itl_ms, "latency ms": result.latency_ms}
    return [
        [*start, label, *(f"{value:.4g}" for value in percentiles.values())]
        for start, (label, percentiles) in zip(starts, figures.items(), strict=True)
    ]


def one_target_note(result: LoadResult) -> str:
    met = [f"{use} {'met' if ok else 'missed'}" for use, ok in result.targets_met.items()]
    failed = f"; {result.errors} requests failed" if result.errors else ""
    return f"{result.load.name}: 95 % within the target of {', '.join(met)}{failed}"


def _servers(results: RunResults) -> list[tuple[str, Sequence[LoadResult]]]:
    return [
        *((row.name, row.serving) for row in results.variants if row.serving),
        *((f"{other.model} at {other.url}", other.load) for other in results.endpoints),
    ]


def markdown(head: list[str], rows: list[list[str]], *, text_columns: int) -> str:
    """A markdown table; columns after the first `text_columns` are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def markdown_table(results: RunResults) -> str:
    """The final table as markdown."""
    return markdown(*table_rows(results), text_columns=2)


def csv_table(results: RunResults) -> str:
    """The final table as CSV."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(
        [table_rows(results)[0], *table_rows(results)[1]]
    )
    return written.getvalue()


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _spread(value: float | None, error: float | None, digits: int) -> str:
    return _number(value, digits) + ("" if error is None else f" ± {error:.{digits}f}")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _row(
    row: VariantResult, extra: Sequence[str], names: Sequence[str], *, drafts: bool
) -> list[str]:
    quality, alone, busy = row.quality, row.speed[0], row.speed[-1]
    mark = " †" if row.collapsed else ""
    slow = " *" if row.notes else ""
    cells = [
        row.name + mark,
        row.precision,
        str(row.layers),
        f"{row.bits_per_weight:.2f}",
        f"{row.disk_bytes / 1e6:.1f}",
        f"{100 / row.shrinkage:.0f}",
        _number(quality.perplexity, 2),
        _number(quality.kl, 4),
        _number(_percent(quality.top1_agreement), 1),
    ]
    for name in extra:
        quality_there = row.long if name.startswith("KL at") else row.own_text
        cells.append(_number(quality_there.kl if quality_there else None, 4))
    for name in names:
        found, change = answered(row, name), row.changes.get(name)
        if found is None:
            cells.append("–")
            continue
        error = "" if found[1] is None else f" ± {found[1]:.1f}"
        cells.append(f"{found[0]:.1f}{error}{' ~' if change and change.is_noise else ''}")
    return [
        *cells,
        f"{busy.output_tokens_per_s.median:.1f}{slow}",
        f"{row.speedup:.2f}",
        *([_number(row.draft.gain if row.draft else None, 2)] if drafts else []),
        f"{alone.latency_ms.median:.0f}",
        f"{row.memory.weights_bytes / 1e6:.0f}",
        f"{row.memory.peak_bytes / 1e6:.0f}",
    ]
