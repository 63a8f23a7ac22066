"""Run the commands that the guide shows, and paste what they print:

    python -m scripts.run_docs [--model FOLDER] [--write]

A block of ```console holds commands behind `$ ` and what they printed. All blocks of all pages, in the
order of PAGES, run in one folder, so a page may use what an earlier one made; a block behind the comment
`<!-- not run: REASON -->` does not. --write pastes the output (of stdout) into the English pages, and into
the Korean ones, whose commands are the same. --model: instead of smollm2-135m, such as a tiny one in tests.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (
    "setup", "quantization", "pruning", "distillation", "serving", "workflow", "strategies",
)  # fmt: skip
MODEL = "smollm2-135m"
_BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n)?```console\n(.*?)```\n", re.DOTALL)


class Block(NamedTuple):
    """Of one page."""

    commands: tuple[str, ...]
    """Each may go on over lines that end with a backslash, or hold a document up to its end"""
    output: str
    runs: bool


def blocks_of(text: str) -> Iterator[tuple[re.Match[str], Block]]:
    """The console blocks of a page, with where they are."""
    for match in _BLOCK.finditer(text):
        commands: list[str] = []
        output: list[str] = []
        lines = iter(match[2].splitlines())
        for line in lines:
            if not line.startswith("$ "):
                output.append(line)
                continue
            command = line.removeprefix("$ ")
            while command.endswith("\\"):
                command += "\n" + next(lines)
            ends = re.search(r"<<'(\w+)'", command)
            while ends and not command.endswith(f"\n{ends[1]}"):
                command += "\n" + next(lines)
            commands.append(command)
        yield match, Block(tuple(commands), "\n".join(output), match[1] is None)


def run(command: str, folder: Path, model: str) -> str:
    """What a command prints. Raises SystemExit where it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = re.sub(rf"\b{MODEL}\b", shlex.quote(model), command)
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1"},
    )  # fmt: skip
    if done.returncode:
        _stop_server(folder)
        raise SystemExit(f"{command}\nexit {done.returncode}\n{done.stdout}{done.stderr}")
    # without the blanks that fill a terminal's line
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def _stop_server(folder: Path) -> None:
    """End what the page on serving started, whose last command did not come."""
    started = folder / "serve.pid"
    if started.exists():
        with suppress(ProcessLookupError):
            os.kill(int(started.read_text()), signal.SIGTERM)


def with_outputs(text: str, outputs: dict[tuple[str, ...], str]) -> str:
    """A page with the output of each block that was run."""

    def filled(match: re.Match[str]) -> str:
        ((_, block),) = blocks_of(match[0])
        if not block.runs or block.commands not in outputs:
            return match[0]
        shown = "\n".join(f"$ {command}" for command in block.commands)
        output = outputs[block.commands]
        return f"```console\n{shown}\n{output}{chr(10) if output else ''}```\n"

    return _BLOCK.sub(filled, text)


def run_all(model: str, folder: Path) -> dict[tuple[str, ...], str]:
    """What every block of the English guide prints, by its commands."""
    outputs = {}
    for page in PAGES:
        text = (DOCS / "guide" / f"{page}.md").read_text("utf-8")
        for _, block in blocks_of(text):
            if block.runs:
                started = time.monotonic()
                printed = [run(command, folder, model) for command in block.commands]
                outputs[block.commands] = "\n".join(filter(None, printed))
                print(
                    f"{page}: {block.commands[0]} ({time.monotonic() - started:.0f} s)", flush=True
                )
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outputs = run_all(arguments.model, Path(folder))
    if arguments.write:
        for guide in (DOCS / "guide", DOCS / "ko" / "guide"):
            for page in PAGES:
                path = guide / f"{page}.md"
                path.write_text(with_outputs(path.read_text("utf-8"), outputs), "utf-8")


if __name__ == "__main__":
    main()
