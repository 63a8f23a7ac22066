"""Structured pruning: a smaller plain model of the same architecture.

Start at `prune` (driver.py). plan.py checks, choice.py decides what goes, importance.py scores parts,
trial.py measures cuts, cut.py cuts tensors, latency.py times sizes.
"""

from tinier.pruning.choice import choose
from tinier.pruning.cut import Cut, Sizes
from tinier.pruning.driver import prune, write_pruned
from tinier.pruning.importance import Importance, measure_importance
from tinier.pruning.plan import METHODS, PrunePlan, parse_layers, plan_prune
from tinier.pruning.trial import divergences

__all__ = [
    "METHODS",
    "Cut",
    "Importance",
    "PrunePlan",
    "Sizes",
    "choose",
    "divergences",
    "measure_importance",
    "parse_layers",
    "plan_prune",
    "prune",
    "write_pruned",
]
