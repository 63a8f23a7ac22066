"""From measured variants to a choice: the Pareto front, and the three that a user picks from.

Start at `pareto_front` and `choose` (pareto.py).
"""

from tinier.search.pareto import Candidate, Choices, choose, pareto_front

__all__ = ["Candidate", "Choices", "choose", "pareto_front"]
