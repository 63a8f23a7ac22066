"""The Pareto front of two figures that are both better when larger, and three choices from it.

Quality is retained quality: 1 is the base model. Gains are factors: throughput over the base's, and
the base's size over the variant's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# a variant that keeps less than this share of the base's quality is reported as collapsed
COLLAPSED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    name: str
    quality: float
    """Share of the base's quality that is left."""
    speedup: float
    """Throughput over the base's."""
    shrinkage: float
    """The base's size over this one's."""

    @property
    def efficiency(self) -> float:
        """Geometric mean of both gains."""
        return math.sqrt(self.speedup * self.shrinkage)

    @property
    def beats_base(self) -> bool:
        """Whether it is as fast and as small, and more in one."""
        return self.speedup >= 1 and self.shrinkage >= 1 and self.efficiency > 1

    @property
    def collapsed(self) -> bool:
        return not self.quality >= COLLAPSED  # a model that gives no numbers has collapsed too


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Names of variants that are neither slower nor larger than the base; it is not among them."""

    best_quality: str
    """Keeps most of the base's quality."""
    balance: str | None
    """Largest product of quality and efficiency; None where the base's, which is 1, is larger."""
    greatest_efficiency: str
    """Largest gain in throughput and size that has not collapsed."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in one figure and equals in the other.

    Larger is better in both. In order of the first figure.
    """
    front = [
        i
        for i, (x, y) in enumerate(points)
        if not any(u >= x and v >= y and (u > x or v > y) for u, v in points)
    ]
    return sorted(front, key=lambda i: points[i])


def choose(candidates: Sequence[Candidate]) -> Choices | None:
    """The three choices among compressed variants; None where all have collapsed, or are slower or larger
    than the base: then the base is the choice."""
    usable = [c for c in candidates if not c.collapsed and c.beats_base]
    if not usable:
        return None
    balanced = max(usable, key=lambda c: c.quality * c.efficiency)
    return Choices(
        best_quality=max(usable, key=lambda c: c.quality).name,
        balance=balanced.name if balanced.quality * balanced.efficiency > 1 else None,
        greatest_efficiency=max(usable, key=lambda c: c.efficiency).name,
    )
