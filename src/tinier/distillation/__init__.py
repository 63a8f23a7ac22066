"""Distillation: a smaller student learns the original's output distribution; on a grid, if asked to.

Start at `distill` (driver.py). plan.py checks, trainer.py has the loop, student.py what is trained and
written, teacher.py what is learned from, losses.py the chunked losses. `prune_and_heal` (healing.py)
alternates pruning and distillation.
"""

from tinier.distillation.driver import check_folders, distill
from tinier.distillation.healing import HealPlan, plan_prune_and_heal, prune_and_heal
from tinier.distillation.losses import Hard, Mixed, Soft, TopK, chunked_loss, hidden_loss
from tinier.distillation.plan import DistillPlan, parse_pairs, plan_distill

__all__ = [
    "DistillPlan",
    "Hard",
    "HealPlan",
    "Mixed",
    "Soft",
    "TopK",
    "check_folders",
    "chunked_loss",
    "distill",
    "hidden_loss",
    "parse_pairs",
    "plan_distill",
    "plan_prune_and_heal",
    "prune_and_heal",
]
