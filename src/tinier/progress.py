"""Progress on stderr: bars with the time left on a terminal, plain lines elsewhere.

Off until `enable()` (the command line calls it unless `--quiet`), so that the Python functions
print nothing of their own.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 30.0

_enabled = False
_bars: Progress | None = None


def enable(on: bool = True) -> None:
    global _enabled
    _enabled = on


def say(message: str) -> None:
    """One line on stderr, above any bar."""
    if not _enabled:
        return
    if _bars is not None:
        _bars.console.print(message, highlight=False, markup=False)
    else:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Something that the user should know before trusting the result; shown with --quiet too."""
    if _bars is not None:
        _bars.console.print(f"warning: {message}", highlight=False, markup=False)
    else:
        logging.getLogger("tinier").warning(message)


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of `total` units; yields a function that advances it by n units."""
    if not _enabled:
        yield lambda count: None
    elif sys.stderr.isatty():
        with _terminal_bar(label, total) as advance:
            yield advance
    else:
        with _lines(label, total) as advance:
            yield advance


@contextmanager
def _terminal_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    # rich allows one live display at a time, so nested bars are rows of the outermost one
    global _bars
    outermost = _bars is None
    if _bars is None:
        _bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        _bars.start()
    task = _bars.add_task(label, total=total)
    bars = _bars
    try:
        yield lambda count: bars.advance(task, count)
    finally:
        if outermost:
            bars.stop()
            _bars = None
        else:
            bars.remove_task(task)


@contextmanager
def _lines(label: str, total: int) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _LINE_SECONDS and 0 < done < total:
            last = now
            left = (now - started) / done * (total - done)
            say(f"{label}: {done}/{total}, {left:.0f} s left")

    yield advance
    say(f"{label}: {time.monotonic() - started:.1f} s")
