"""Budgets as people type them."""

from collections.abc import Callable
from typing import Any

import pytest

from tinier.errors import InputError
from tinier.fitting import Amount, Budget, Figures
from tinier.fitting.budget import (
    parse_bytes,
    parse_latency,
    parse_load,
    parse_quality,
    parse_seconds,
    parse_throughput,
)

BASE = Figures(size=2e9, memory=3e9, throughput=100.0, latency=10.0, quality=1.0)


def test_amounts() -> None:
    assert parse_bytes("2.4GB", "--max-memory") == Amount(2.4e9, relative=False)
    assert parse_bytes("512 MiB", "--max-size") == Amount(512 * 2**20, relative=False)
    assert parse_bytes("37.5%", "--max-size").of(8e9) == 3e9
    assert parse_throughput("2x") == Amount(2, relative=True)
    assert parse_throughput("1500").of(3) == 1500
    assert parse_latency("20ms") == 20
    assert parse_latency("0.5s") == 500
    assert parse_quality("95%") == 0.95
    assert parse_seconds("90s") == 90
    assert parse_seconds("2h") == 7200
    load = parse_load("512/128@4")
    assert (load.input_length, load.output_length, load.concurrency) == (512, 128, 4)
    assert parse_load("64/32").concurrency == 1


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (lambda t: parse_bytes(t, "--max-size"), "2.4"), (lambda t: parse_bytes(t, "--max-size"), "0GB"),
        (parse_throughput, "fast"), (parse_latency, "20"), (parse_quality, "0.95"), (parse_load, "512"),
        (parse_seconds, "60"),
    ],
)  # fmt: skip
def test_what_is_no_amount(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(InputError, match="Use"):
        parse(text)


def test_limits_are_absolute_and_say_what_breaks_them() -> None:
    budget = Budget(
        max_size=Amount(0.4, relative=True),
        min_throughput=Amount(2, relative=True),
        min_quality=0.9,
    )
    limits = budget.limits(BASE)
    assert (limits.size, limits.throughput, limits.memory) == (0.8e9, 200, None)
    assert limits.broken(Figures(0.8e9, 9e9, 200, 99, 0.9)) == []
    assert limits.broken(Figures(0.9e9, 9e9, 199, 99, 0.8)) == ["size", "throughput", "quality"]
    assert budget.limits_anything
    assert not Budget().limits_anything


def test_budgets_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="minute or more"):
        Budget(seconds=5)
    with pytest.raises(InputError, match="95%"):
        Budget(min_quality=1.5)
