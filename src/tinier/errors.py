"""Errors that a user can cause, and what the program answers to each.

    TinierError
    ├── InputError            exit code 2: what was given cannot be used
    │   ├── CheckpointError   a model folder or one of its files
    │   ├── SchemeError       a number format that does not fit a layer
    │   ├── RecipeError       a recipe file
    │   ├── TextError         a text source, or an MMLU folder
    │   ├── OutputError       the output folder: it exists, or the disk is full
    │   └── NetworkError      something must be downloaded and cannot be
    └── MeasuredFailure       exit code 1: the work was done and a check did not hold

A message has three parts: what was given, what is allowed, what to type instead. Our own
invariants are `assert`s, never these.
"""


class TinierError(Exception):
    """Base of every error that tinier raises on purpose."""

    exit_code = 1


class InputError(TinierError, ValueError):
    exit_code = 2


class CheckpointError(InputError):
    pass


class SchemeError(InputError):
    pass


class RecipeError(InputError):
    pass


class TextError(InputError):
    pass


class OutputError(InputError):
    pass


class NetworkError(InputError):
    pass


class MeasuredFailure(TinierError):
    exit_code = 1
