"""The main job: a recipe names a base model, its variants and what to measure; a run makes them all.

Start at `load_recipe` (schema.py), then `run_recipe` (run.py).
"""

from tinier.recipe.plan import PlannedRun, describe, plan_recipe
from tinier.recipe.results import (
    EndpointResult,
    Failure,
    RunResults,
    VariantResult,
    add_endpoint,
    load_results,
)
from tinier.recipe.run import check_run_folder, run_recipe
from tinier.recipe.schema import Recipe, load_recipe

__all__ = [
    "EndpointResult",
    "Failure",
    "PlannedRun",
    "Recipe",
    "RunResults",
    "VariantResult",
    "add_endpoint",
    "check_run_folder",
    "describe",
    "load_recipe",
    "load_results",
    "plan_recipe",
    "run_recipe",
]
