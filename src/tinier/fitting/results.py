"""What `tinier fit` found: `fit.json` as Python objects. Start at `FitResults`."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from tinier.errors import InputError
from tinier.fitting.budget import Figures, Limits

SCHEMA = 1
RESULT = "fit.json"


@dataclass(frozen=True, kw_only=True)
class Point(Figures):
    """Of the front."""

    kind: Literal["measured", "predicted"]
    name: str


@dataclass(frozen=True, kw_only=True)
class Alternative(Figures):
    """What another choice would have, as predicted."""

    what: Literal["smaller", "faster", "better"]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate."""

    why: str
    design: dict[str, Any]
    """Sizes, layers that go, the format of each part, training steps"""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The candidate that makes the base itself fastest: it proposes tokens, the text stays the base's."""

    name: str
    gain: float
    """Tokens/s of the base with it over those without, one greedy text at a time"""
    greedy: float
    """Share of tokens where both models' likeliest is the same"""


@dataclass(frozen=True, kw_only=True)
class FitResults:
    """What fit.json holds."""

    schema: int
    command: str
    model: str
    budget: dict[str, Any]
    """As it was asked"""
    limits: Limits
    base: Figures
    winner: str | None
    """None: no model that was made keeps the budget"""
    winner_figures: Figures | None
    nearest: dict[str, float | None] | None
    """Without a winner, for each limit what it would have to be, the others kept, as predicted; None: that
    alone does not help"""
    alternatives: tuple[Alternative, ...]
    front: tuple[Point, ...]
    candidates: dict[str, Tried]
    prediction_errors: dict[str, tuple[float, ...]]
    """By figure: predicted over measured, less one"""
    seconds: float
    draft: Draft | None = None
    """Where it was asked for"""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return values

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        from tinier.report.notebook import fit_html  # pages stand below (tests/test_imports.py)

        return fit_html(self)

    def front_csv(self) -> str:
        """The front as CSV."""
        written = io.StringIO()
        names = ["kind", "name", *(field.name for field in fields(Figures))]
        writer = csv.DictWriter(written, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in self.front)
        return written.getvalue()


@cache
def _adapter() -> TypeAdapter[FitResults]:
    return TypeAdapter(FitResults)


def load_fit(run: Path) -> FitResults | None:
    """fit.json of a run folder; None where `tinier fit` did not make it. Raises InputError for a damaged
    one, and for one of another schema."""
    path = run / RESULT
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if isinstance(schema, int) and schema != SCHEMA:
            raise InputError(
                f"{path} has schema {schema}; this tinier reads {SCHEMA}. Run it again."
            )
        return _adapter().validate_python(values)
    except (ValidationError, ValueError) as error:
        told = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a result of tinier fit ({told:.300}). Run `tinier fit` again."
        ) from None
