"""What compression cost: perplexity, divergence from the original, MMLU.

Start at `evaluate` (quality.py), `compare` (compare.py) and `evaluate_mmlu` (mmlu.py). All run on the
engine's decoder, the one that serves the model; served.py sends requests to the whole engine instead.
"""

from tinier.evaluation.compare import Comparison, LayerDifference, compare
from tinier.evaluation.mmlu import MmluPlan, MmluResult, evaluate_mmlu, load_mmlu
from tinier.evaluation.quality import Quality, Reference, evaluate, reference_states
from tinier.evaluation.served import evaluate_mmlu_served, evaluate_served, measure_served

__all__ = [
    "Comparison",
    "LayerDifference",
    "MmluPlan",
    "MmluResult",
    "Quality",
    "Reference",
    "compare",
    "evaluate",
    "evaluate_mmlu",
    "evaluate_mmlu_served",
    "evaluate_served",
    "load_mmlu",
    "measure_served",
    "reference_states",
]
