"""Which format each part gets: the least sum of costs whose sizes keep within limits.

A multiple-choice knapsack as a mixed-integer program: one format a part, minimize Σ cost, Σ size ≤ limit
for each kind of size (bytes, milliseconds). HiGHS, through scipy, finds the least sum, to a millionth.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from tinier.errors import InputError

Options = Mapping[str, Mapping[str, float]]
"""A number for each format that a part may have, by part"""


_SLACK = 1e-9
"""Of a limit, for rounding of floats"""


def allocate(costs: Options, limits: Sequence[tuple[Options, float]]) -> dict[str, str]:
    """The format of each part. costs: what each format of each part costs. limits: sizes, and what they may
    add up to.

    Raises InputError where no choice keeps within all limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    picks = [(part, label) for part, options in costs.items() for label in options]
    row_of = {part: row for row, part in enumerate(costs)}
    rows = np.array([row_of[part] for part, _ in picks])
    one_each = csr_array((np.ones(len(picks)), (rows, np.arange(len(picks)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for sizes, limit in limits:
        row = np.array([sizes[part][label] for part, label in picks])
        scale = abs(limit) or 1.0  # numbers near one, for the solver's tolerances
        constraints.append(LinearConstraint(row[None] / scale, -np.inf, limit / scale + _SLACK))
    objective = np.array([costs[part][label] for part, label in picks])
    most = float(np.abs(objective).max()) or 1.0
    with _silent():
        found = milp(
            objective / most, integrality=np.ones(len(picks)), bounds=Bounds(0, 1),
            constraints=constraints, options={"mip_rel_gap": 1e-6},
        )  # fmt: skip
    if found.x is None:
        raise InputError(
            f"no choice of formats keeps within the limits ({found.message}). Allow more bits or bytes."
        )
    return {part: label for (part, label), x in zip(picks, found.x, strict=True) if x > 0.5}


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints a line of its own now and then, whatever it is told."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
