"""`tinier`: the program. Each verb is a function of the same name in a file of its own."""

import io
import os
import sys
from collections.abc import Callable

import typer

import tinier
from tinier.cli.advise import advise
from tinier.cli.bench import bench
from tinier.cli.compare import compare
from tinier.cli.distill import distill
from tinier.cli.doctor import doctor
from tinier.cli.eval import eval_
from tinier.cli.export import export
from tinier.cli.fit import fit
from tinier.cli.generate import generate
from tinier.cli.import_ import import_
from tinier.cli.prune import prune
from tinier.cli.quantize import quantize
from tinier.cli.report import report
from tinier.cli.run import run
from tinier.cli.serve import serve
from tinier.errors import TinierError

app = typer.Typer(
    name="tinier",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # plain help: the same text on every terminal, pinned in docs/cli.md
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
INTERRUPTED = 130
"""Exit code after Ctrl-C"""
VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "fit": fit,
    "quantize": quantize,
    "prune": prune,
    "distill": distill,
    "export": export,
    "import": import_,
    "eval": eval_,
    "compare": compare,
    "generate": generate,
    "bench": bench,
    "serve": serve,
    "report": report,
    "advise": advise,
    "doctor": doctor,
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
      tinier run demo
      tinier quantize smollm2-135m --preset int4 --group-size 64 --out smollm2-int4
      tinier eval smollm2-int4 --against smollm2-135m

    Exit codes: 0 done, 1 a measured failure or a fault of tinier's own, 2 bad input.
    """


def main() -> None:
    """Run the command line. Errors are one line on stderr; a traceback is shown with --debug alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no é shows ? for it
            stream.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print(_stopped(sys.argv[1:]), file=sys.stderr)
        raise
    except BrokenPipeError:
        # whoever read our output has gone; Python must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message, code = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)


def _stopped(arguments: list[str]) -> str:
    """What to tell the user after Ctrl-C."""
    verb = next((word for word in arguments if word in VERBS), None)
    if verb in ("run", "fit", "quantize", "distill", "export"):
        return "\nstopped. Nothing is half-written; the same command goes on where it was."
    if verb == "prune":
        return "\nstopped. Nothing is written; the same command takes finished measurements from the cache."
    return "\nstopped."


def _explain(error: Exception) -> tuple[str, int]:
    """What to tell the user of an exception, and the exit code."""
    if isinstance(error, TinierError):
        return str(error), error.exit_code
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}.", 2
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {said:.200} Use smaller sizes, or another --device.", 1
    return (
        f"this should not happen ({type(error).__name__}: {said:.300}). It is a fault of tinier: type the "
        "same with --debug, and report what it prints."
    ), 1


if __name__ == "__main__":
    main()
