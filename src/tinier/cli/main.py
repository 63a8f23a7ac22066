"""`tinier`: the program. Each verb is a function of the same name in a file of its own."""

import sys
from collections.abc import Callable

import typer

import tinier
from tinier.cli.bench import bench
from tinier.cli.compare import compare
from tinier.cli.distill import distill
from tinier.cli.eval import eval_
from tinier.cli.generate import generate
from tinier.cli.prune import prune
from tinier.cli.quantize import quantize
from tinier.cli.report import report
from tinier.cli.run import run
from tinier.cli.serve import serve
from tinier.errors import TinierError

app = typer.Typer(
    name="tinier",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: the same text on every terminal, pinned in docs/cli.md
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "quantize": quantize,
    "prune": prune,
    "distill": distill,
    "eval": eval_,
    "compare": compare,
    "generate": generate,
    "bench": bench,
    "serve": serve,
    "report": report,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


def _version(asked: bool) -> None:
    if asked:
        print(f"tinier {tinier.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Make large language models smaller and faster, and prove what that cost.

    \b
    Examples:
      tinier run recipes/demo.yaml
      tinier quantize smollm2-135m --preset int4 --group-size 64 --out smollm2-int4
      tinier eval smollm2-int4 --against smollm2-135m

    Exit codes: 0 done, 1 a measured failure, 2 bad input.
    """


def main() -> None:
    """Run the command line; known errors are one line on stderr."""
    try:
        app()
    except TinierError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
