"""tinier makes large language models smaller and faster, and proves what that cost.

    import tinier

    base = tinier.open_model("smollm2-135m")
    plan = tinier.QuantizePlan(preset="int4", group_size=64)
    small = tinier.quantize(base, plan, Path("smollm2-int4"))

The names in `__all__` are the public ones; each is imported when it is first used, so that
`import tinier` and `tinier --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinier.checkpoint import Checkpoint
    from tinier.distillation import DistillPlan, distill
    from tinier.engine import Engine, EngineConfig, SamplingParams
    from tinier.errors import InputError, MeasuredFailure, TinierError
    from tinier.evaluation import evaluate, evaluate_mmlu
    from tinier.families import open_model
    from tinier.fitting import Budget, FitPlan, fit
    from tinier.pruning import PrunePlan, prune
    from tinier.quantization import QuantizePlan, quantize
    from tinier.recipe import load_recipe, run_recipe
    from tinier.report import write_report

_MODULES = {
    "Budget": "tinier.fitting",
    "Checkpoint": "tinier.checkpoint",
    "DistillPlan": "tinier.distillation",
    "Engine": "tinier.engine",
    "EngineConfig": "tinier.engine",
    "FitPlan": "tinier.fitting",
    "InputError": "tinier.errors",
    "MeasuredFailure": "tinier.errors",
    "PrunePlan": "tinier.pruning",
    "QuantizePlan": "tinier.quantization",
    "SamplingParams": "tinier.engine",
    "TinierError": "tinier.errors",
    "distill": "tinier.distillation",
    "evaluate": "tinier.evaluation",
    "evaluate_mmlu": "tinier.evaluation",
    "fit": "tinier.fitting",
    "load_recipe": "tinier.recipe",
    "open_model": "tinier.families",
    "prune": "tinier.pruning",
    "quantize": "tinier.quantization",
    "run_recipe": "tinier.recipe",
    "write_report": "tinier.report",
}

__all__ = [
    "Budget",
    "Checkpoint",
    "DistillPlan",
    "Engine",
    "EngineConfig",
    "FitPlan",
    "InputError",
    "MeasuredFailure",
    "PrunePlan",
    "QuantizePlan",
    "SamplingParams",
    "TinierError",
    "distill",
    "evaluate",
    "evaluate_mmlu",
    "fit",
    "load_recipe",
    "open_model",
    "prune",
    "quantize",
    "run_recipe",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tinier' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
