"""`tinier report`"""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Of several runs: the page to write.", show_default="comparison.html"
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Write and print the report of a finished run again, or put several runs beside each other.

    One run: report.html, report.md, table.csv and the pictures, in its folder. Several: one page with all
    their variants. The page needs no network.

    \b
    Examples:
      tinier report runs/demo
      tinier report runs/demo runs/fit --out both.html
    """
    from tinier.errors import InputError
    from tinier.recipe import load_results
    from tinier.report import Run, write_html, write_report
    from tinier.report.terminal import results_text

    output.start(quiet=quiet, log_level=log_level)
    if len(run) == 1 and out is not None:
        raise InputError(
            "--out is for several runs: the report of one is in its folder. Leave it out."
        )
    found = [Run(load_results(folder), folder) for folder in run]
    if len(found) == 1:
        page = write_report(found[0].results, found[0].folder)
    else:
        page = write_html(found, out or Path("comparison.html"))
    text = "\n\n".join(results_text(one.results) for one in found)
    values = [one.results.to_json() for one in found]
    data = values[0] if len(values) == 1 else {"runs": values}
    output.result(f"{text}\n{page}", data, as_json=json)
