"""Where output goes: the result to stdout, progress and logs to stderr."""

import json
import logging
import sys
from typing import Any

from tinier import progress
from tinier.errors import InputError

_LEVELS = ("debug", "info", "warning", "error")


def start(*, quiet: bool, log_level: str) -> None:
    """Set up progress and logging for one command. Raises InputError for an unknown level."""
    if log_level.lower() not in _LEVELS:
        raise InputError(f"log level {log_level!r} is not known. Use one of {', '.join(_LEVELS)}.")
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    progress.enable(not quiet)
    # transformers draws bars of its own for steps that take a second
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not quiet:
        # that switched the Hub's bars off too, and a download takes minutes
        from huggingface_hub.utils import enable_progress_bars

        enable_progress_bars()
    transformers_logging.set_verbosity_error()


def result(text: str, data: dict[str, Any], *, as_json: bool) -> None:
    """Print the result: for people, or as one last line of JSON."""
    print(json.dumps(data, allow_nan=False) if as_json else text, flush=True)
