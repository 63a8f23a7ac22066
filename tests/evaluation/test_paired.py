import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinier.errors import InputError
from tinier.evaluation import compare_answers

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)


def test_mcnemar_of_a_textbook_table() -> None:
    # 121 and 59 changed answers of 1,000: two-sided exact binomial p of Bin(180, 1/2)
    base = "1" * 121 + "0" * 59 + "1" * 400 + "0" * 420
    variant = "0" * 121 + "1" * 59 + "1" * 400 + "0" * 420
    change = compare_answers(base, variant)
    assert (change.lost, change.gained) == (121, 59)
    exact = 2 * sum(math.comb(180, k) for k in range(60)) / 2**180
    assert change.p_value == pytest.approx(exact, rel=1e-6)
    assert not change.is_noise
    assert change.difference == pytest.approx(-0.062)


def test_what_changes_as_often_both_ways_is_noise() -> None:
    change = compare_answers("1100", "1010")
    assert (change.lost, change.gained, change.difference, change.p_value) == (1, 1, 0.0, 1.0)
    assert change.is_noise
    assert compare_answers("1100", "1100").stderr == 0.0


@given(ANSWERS)
def test_the_standard_error_is_that_of_the_differences(pairs: list[tuple[bool, bool]]) -> None:
    base, variant = ("".join(str(int(p[i])) for p in pairs) for i in (0, 1))
    change = compare_answers(base, variant)
    differences = [int(b) - int(a) for a, b in pairs]
    mean = sum(differences) / len(pairs)
    variance = sum((d - mean) ** 2 for d in differences) / len(pairs)
    assert change.difference == pytest.approx(mean, abs=1e-12)
    assert change.stderr == pytest.approx(math.sqrt(variance / len(pairs)), abs=1e-12)


@pytest.mark.parametrize(("base", "variant"), [("", ""), ("10", "1")])
def test_answers_to_other_questions_are_refused(base: str, variant: str) -> None:
    with pytest.raises(InputError, match="cannot be compared in pairs"):
        compare_answers(base, variant)
