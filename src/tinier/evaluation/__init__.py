"""What compression cost: perplexity, divergence from the original, MMLU.

Start at `evaluate` (quality.py) and `evaluate_mmlu` (mmlu.py). Both run on the engine's decoder,
the one that serves the model.
"""

from tinier.evaluation.mmlu import MmluPlan, MmluResult, evaluate_mmlu, load_mmlu
from tinier.evaluation.quality import Quality, Reference, evaluate, reference_states

__all__ = [
    "MmluPlan",
    "MmluResult",
    "Quality",
    "Reference",
    "evaluate",
    "evaluate_mmlu",
    "load_mmlu",
    "reference_states",
]
