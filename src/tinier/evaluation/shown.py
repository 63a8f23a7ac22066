"""A quality and a comparison as a notebook shows them. Start at `quality_html`.

They stand here and not with the pages of runs, whose code no measurement depends on.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinier.evaluation.comparison import LayerDifference
    from tinier.evaluation.quality import Quality


def quality_html(quality: "Quality") -> str:
    """Every figure with its standard error."""
    spread = None
    if quality.perplexity is not None and quality.nll_stderr is not None:
        spread = quality.perplexity * quality.nll_stderr  # to first order
    figures = (
        ("perplexity", quality.perplexity, spread),
        ("KL from the original, nats per token", quality.kl, quality.kl_stderr),
        ("top-1 agreement", quality.top1_agreement, quality.top1_stderr),
    )
    rows = [[name, _number(value), _number(error)] for name, value, error in figures]
    return html_table(["", "", "± standard error"], [*rows, ["tokens", str(quality.tokens), ""]])


def layers_html(layers: "Sequence[LayerDifference]") -> str:
    """What each layer adds, and what has piled up behind it."""
    rows = [
        [layer.name, _number(layer.layer_snr_db), f"{layer.added_error:.2e}", _number(layer.stream_snr_db)]
        for layer in layers
    ]  # fmt: skip
    return html_table(["layer", "alone, dB", "adds error", "piled up, dB"], rows) if rows else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """Texts, escaped, as a table."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(cell: str, texts: list[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in texts) + "</tr>"
