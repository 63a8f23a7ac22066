"""The solver finds what trying everything finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinier.errors import InputError
from tinier.quantization.allocation import allocate


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_it_is_the_best_there_is_within_two_limits(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    parts, labels = [f"part{i}" for i in range(5)], ["a", "b", "c"]

    def table() -> dict[str, dict[str, float]]:
        return {p: {label: float(random.uniform(0.1, 3)) for label in labels} for p in parts}

    costs, sizes, times = table(), table(), table()
    choices = [
        dict(zip(parts, picks, strict=True)) for picks in itertools.product(labels, repeat=5)
    ]

    def total(of: dict[str, dict[str, float]], choice: dict[str, str]) -> float:
        return sum(of[part][label] for part, label in choice.items())

    limits = []
    for of in (sizes, times):
        totals = sorted(total(of, choice) for choice in choices)
        limits.append((of, totals[int(share * (len(totals) - 1))]))
    within = [c for c in choices if all(total(of, c) <= limit + 1e-9 for of, limit in limits)]
    if not within:
        with pytest.raises(InputError, match="no choice of formats keeps within the limits"):
            allocate(costs, limits)
        return
    found = allocate(costs, limits)
    best = min(total(costs, choice) for choice in within)
    assert total(costs, found) <= best * (1 + 1e-3)
    assert all(total(of, found) <= limit * (1 + 1e-6) for of, limit in limits)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    parts = [f"part{i}" for i in range(120)]
    costs = {p: {label: float(random.uniform(0.1, 3)) for label in "abcdefg"} for p in parts}
    sizes = {p: {label: float(random.uniform(0.1, 3)) for label in "abcdefg"} for p in parts}
    for limit in (60.0, 90.0, 120.0):
        allocate(costs, [(sizes, limit)])
    assert capfd.readouterr().out == ""
