import random

from tinier.search import Candidate, choose, pareto_front


def test_front_is_what_nothing_beats() -> None:
    points = [(1.0, 1.0), (2.0, 0.9), (1.5, 0.8), (3.0, 0.5), (3.0, 0.4), (0.5, 1.0)]
    assert pareto_front(points) == [0, 1, 3]


def test_equal_points_are_both_on_the_front() -> None:
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]
    assert pareto_front([]) == []


def test_front_by_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(12)]
        front = pareto_front(points)
        for i, (x, y) in enumerate(points):
            beaten = any((u >= x and v >= y) and (u, v) != (x, y) for u, v in points)
            assert (i in front) != beaten


def candidate(name: str, quality: float, speedup: float, shrinkage: float) -> Candidate:
    return Candidate(name=name, quality=quality, speedup=speedup, shrinkage=shrinkage)


def test_three_choices() -> None:
    choices = choose(
        [
            candidate("fp8", 0.97, 1.2, 1.6),
            candidate("int4", 0.85, 1.5, 2.4),
            candidate("pruned", 0.3, 1.3, 1.3),
            candidate("tiny", 0.51, 2.0, 3.0),
        ]
    )
    assert choices is not None
    assert choices.best_quality == "fp8"
    assert choices.balance == "int4"
    assert choices.greatest_efficiency == "tiny"


def test_collapsed_variants_are_no_choice() -> None:
    assert choose([candidate("pruned", 0.3, 9.0, 9.0)]) is None
    assert choose([]) is None
    assert choose([candidate("broken", float("nan"), 9.0, 9.0)]) is None
    assert candidate("pruned", 0.3, 9.0, 9.0).collapsed


def test_what_the_base_beats_is_no_choice() -> None:
    """Half the size at a quarter of the speed is no gain, nor at 0.97 of it."""
    slow = candidate("fp8", 0.99, 0.26, 1.9)
    assert choose([slow]) is None
    assert choose([candidate("fp8", 0.99, 0.97, 1.9), candidate("wide", 1.0, 1.4, 0.9)]) is None
    choices = choose([slow, candidate("int8", 0.6, 1.3, 1.9)])
    assert choices is not None
    assert choices.best_quality == "int8"
    assert choices.balance is None  # 0.6 * 1.57 is less than the base's 1
