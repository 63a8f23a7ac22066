"""Results as a notebook shows them: the table, what it says, and the curves. Start at `results_html`."""

from html import escape

from tinier.evaluation.shown import html_table
from tinier.fitting import FitResults
from tinier.recipe import RunResults
from tinier.report.choices import choices_text
from tinier.report.fitted import fit_text
from tinier.report.page import footnotes
from tinier.report.plots import GAINS, pareto_svg
from tinier.report.table import table_rows


def results_html(results: RunResults) -> str:
    """The table of a run, its choices and both curves."""
    head, rows = table_rows(results)
    said = [*choices_text(results), *footnotes(results)]
    pictures = "".join(
        f'<div style="flex: 1 1 22em">{svg[svg.index("<svg") :]}</div>'
        for svg in (pareto_svg(results, gain) for gain in GAINS)
    )
    return (
        f"{html_table(head, rows)}<ul>{''.join(f'<li>{_text(line)}</li>' for line in said)}</ul>"
        f'<div style="display: flex; flex-wrap: wrap">{pictures}</div>'
    )


def fit_html(found: FitResults) -> str:
    """What `tinier fit` prints."""
    return f"<pre>{escape(fit_text(found))}</pre>"


def _text(markdown: str) -> str:
    """A line of the report without its emphasis."""
    return escape(markdown.replace("**", "").replace("\\*", "*"))
