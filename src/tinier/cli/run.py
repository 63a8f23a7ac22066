"""`tinier run`"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe file, or demo.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder; default runs/RECIPE. An old one is continued."),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel",
            help="GPUs that share each layer where speed, memory and serving are measured.",
            show_default="the recipe's, or 1",
        ),
    ] = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Make, measure and compare every variant of a recipe.

    Leaves the checkpoints, results.json and the report (report.html, report.md). A run that was
    stopped goes on where it was; what is done and unchanged is not done again.

    \b
    Examples:
      tinier run demo
      tinier run demo --dry-run
      tinier run recipes/guide.yaml --out runs/llama --json
    """
    from tinier.errors import MeasuredFailure
    from tinier.recipe import check_run_folder, describe, load_recipe, plan_recipe, run_recipe
    from tinier.report import write_report
    from tinier.report.terminal import plan_text, results_text

    output.start(quiet=quiet, log_level=log_level)
    loaded = load_recipe(recipe, tensor_parallel)
    folder = out or Path("runs") / recipe.stem
    if dry_run:
        check_run_folder(folder)
        plan = describe(plan_recipe(loaded), folder)
        output.result(plan_text(plan), plan, as_json=json)
        return
    results = run_recipe(loaded, folder, command=shlex.join(["tinier", *sys.argv[1:]]))
    page = write_report(results, folder)
    output.result(f"{results_text(results)}\n{page}", results.to_json(), as_json=json)
    if results.failed:
        names = ", ".join(dict.fromkeys(failure.variant for failure in results.failed))
        raise MeasuredFailure(f"some variants could not be made or measured: {names}. See above.")
