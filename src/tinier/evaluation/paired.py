"""Two models' answers to the same questions: which changed, and whether that is more than chance.

Start at `compare_answers`. The difference of two accuracies on the same questions has a much smaller
standard error than either of them: only questions whose answer changed count.
"""

import math
from dataclasses import dataclass

from tinier.errors import InputError

NOISE = 0.05
"""A difference whose p-value is above is called noise"""


@dataclass(frozen=True, kw_only=True)
class PairedChange:
    """Of a variant's answers against the base's."""

    lost: int
    """Questions that only the base answers rightly"""
    gained: int
    """Questions that only the variant answers rightly"""
    difference: float
    """The variant's accuracy less the base's"""
    stderr: float
    """Standard error of the difference, over questions"""
    p_value: float
    """McNemar's exact test (Psychometrika 12, 1947): how likely so unequal changes are by chance"""

    @property
    def is_noise(self) -> bool:
        return self.p_value > NOISE


def compare_answers(base: str, variant: str) -> PairedChange:
    """base, variant: for each question 1 (right) or 0. Raises InputError for different numbers of them."""
    from scipy.stats import binomtest  # its import takes a second, and every command takes us along

    if len(base) != len(variant) or not base:
        raise InputError(f"{len(base)} and {len(variant)} answers cannot be compared in pairs.")
    pairs = list(zip(base, variant, strict=True))
    lost, gained = pairs.count(("1", "0")), pairs.count(("0", "1"))
    count = len(pairs)
    difference = (gained - lost) / count
    variance = (gained + lost) / count - difference**2
    changed = gained + lost
    return PairedChange(
        lost=lost,
        gained=gained,
        difference=difference,
        stderr=math.sqrt(variance / count),
        p_value=float(binomtest(lost, changed).pvalue) if changed else 1.0,
    )
