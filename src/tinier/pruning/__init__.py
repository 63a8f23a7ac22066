"""Structured pruning: a smaller plain model of the same architecture.

Start at `prune` (depth.py). `importance.py` says which layers matter least.
"""

from tinier.pruning.depth import PrunePlan, parse_layers, plan_prune, prune
from tinier.pruning.importance import block_influence

__all__ = ["PrunePlan", "block_influence", "parse_layers", "plan_prune", "prune"]
