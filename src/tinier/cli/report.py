"""`tinier report`"""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Write and print the report of a finished run again.

    \b
    Example:
      tinier report runs/demo
    """
    from tinier.recipe import load_results
    from tinier.report import write_report
    from tinier.report.terminal import results_text

    output.start(quiet=quiet, log_level=log_level)
    results = load_results(run)
    page = write_report(results, run)
    output.result(f"{results_text(results)}\n{page}", results, as_json=json)
