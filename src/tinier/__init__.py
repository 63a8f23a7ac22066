"""tinier makes large language models smaller and faster, and proves what that cost.

    import tinier

    base = tinier.open_model("smollm2-135m")
    plan = tinier.QuantizePlan(preset="int4-gptq", group_size=64)
    small = tinier.quantize(base, plan, "smollm2-int4")
    tinier.evaluate(small, against=base)

The names in `__all__` are the public ones; each is imported when it is first used, so that
`import tinier` and `tinier --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tinier.benchmark import Workload, bench
    from tinier.checkpoint import Checkpoint
    from tinier.distillation import DistillPlan, HealPlan, distill, prune_and_heal
    from tinier.engine import Engine, EngineConfig, SamplingParams, generate
    from tinier.errors import InputError, MeasuredFailure, TinierError
    from tinier.evaluation import MmluPlan, Quality, compare, evaluate
    from tinier.exporting import export
    from tinier.families import open_model
    from tinier.fitting import Budget, FitPlan, FitResults, fit
    from tinier.pruning import PrunePlan, prune
    from tinier.quantization import QuantizePlan, quantize
    from tinier.recipe import Recipe, RunResults, load_recipe, load_results, run_recipe
    from tinier.report import write_report

_MODULES = {
    "Budget": "tinier.fitting",
    "Checkpoint": "tinier.checkpoint",
    "DistillPlan": "tinier.distillation",
    "Engine": "tinier.engine",
    "EngineConfig": "tinier.engine",
    "FitPlan": "tinier.fitting",
    "FitResults": "tinier.fitting",
    "HealPlan": "tinier.distillation",
    "InputError": "tinier.errors",
    "MeasuredFailure": "tinier.errors",
    "MmluPlan": "tinier.evaluation",
    "PrunePlan": "tinier.pruning",
    "Quality": "tinier.evaluation",
    "QuantizePlan": "tinier.quantization",
    "Recipe": "tinier.recipe",
    "RunResults": "tinier.recipe",
    "SamplingParams": "tinier.engine",
    "TinierError": "tinier.errors",
    "Workload": "tinier.benchmark",
    "bench": "tinier.benchmark",
    "compare": "tinier.evaluation",
    "compare_draft": "tinier.evaluation",
    "distill": "tinier.distillation",
    "evaluate": "tinier.evaluation",
    "export": "tinier.exporting",
    "fit": "tinier.fitting",
    "generate": "tinier.engine",
    "load_recipe": "tinier.recipe",
    "load_results": "tinier.recipe",
    "open_model": "tinier.families",
    "prune": "tinier.pruning",
    "prune_and_heal": "tinier.distillation",
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
    "FitResults",
    "HealPlan",
    "InputError",
    "MeasuredFailure",
    "MmluPlan",
    "PrunePlan",
    "Quality",
    "QuantizePlan",
    "Recipe",
    "RunResults",
    "SamplingParams",
    "TinierError",
    "Workload",
    "bench",
    "compare",
    "compare_draft",
    "distill",
    "evaluate",
    "export",
    "fit",
    "generate",
    "load_recipe",
    "load_results",
    "open_model",
    "prune",
    "prune_and_heal",
    "quantize",
    "run_recipe",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tinier' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
