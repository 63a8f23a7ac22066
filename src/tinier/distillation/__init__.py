"""Distillation: a smaller student learns the original's output distribution.

Start at `distill` (trainer.py). `losses.py` is the loss, computed in chunks.
"""

from tinier.distillation.losses import forward_kl
from tinier.distillation.trainer import DistillPlan, distill, plan_distill

__all__ = ["DistillPlan", "distill", "forward_kl", "plan_distill"]
