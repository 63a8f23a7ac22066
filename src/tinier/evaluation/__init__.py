"""What compression cost: perplexity, divergence from the original, MMLU.

Start at `evaluate` and `compare` (models.py), `evaluate_windows` (quality.py) and `evaluate_mmlu`
(mmlu.py). All run on the engine's decoder, the one that serves the model; served.py sends requests to the
whole engine instead.
tasks.py names tasks of lm-evaluation-harness; harness.py, which needs it, measures them. paired.py compares
two models' answers.
"""

from tinier.evaluation.comparison import Comparison, LayerDifference
from tinier.evaluation.drafting import DraftForecast, compare_draft, measure_draft
from tinier.evaluation.mmlu import MmluPlan, MmluResult, evaluate_mmlu, load_mmlu
from tinier.evaluation.models import compare, evaluate, heldout_windows
from tinier.evaluation.paired import PairedChange, compare_answers
from tinier.evaluation.quality import (
    Quality,
    Reference,
    evaluate_windows,
    reference_states,
    written_text,
)
from tinier.evaluation.served import evaluate_mmlu_served, evaluate_served, measure_served
from tinier.evaluation.tasks import Metric, TaskResult, TasksPlan, task_changes

__all__ = [
    "Comparison",
    "DraftForecast",
    "LayerDifference",
    "Metric",
    "MmluPlan",
    "MmluResult",
    "PairedChange",
    "Quality",
    "Reference",
    "TaskResult",
    "TasksPlan",
    "compare",
    "compare_answers",
    "compare_draft",
    "evaluate",
    "evaluate_mmlu",
    "evaluate_mmlu_served",
    "evaluate_served",
    "evaluate_windows",
    "heldout_windows",
    "load_mmlu",
    "measure_draft",
    "measure_served",
    "reference_states",
    "task_changes",
    "written_text",
]
