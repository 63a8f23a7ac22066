"""The best model within a budget of bytes, milliseconds and quality.

Start at `fit` (driver.py): what parts cost is measured once (speed.py, sensitivity.py), the choice of
formats and sizes is solved (costs.py), and candidates are made and measured as variants of a recipe
(chains.py).
"""

from tinier.fitting.budget import Amount, Budget, Figures, Limits
from tinier.fitting.driver import FitPlan, describe, fit
from tinier.fitting.results import Draft, FitResults, load_fit

__all__ = [
    "Amount",
    "Budget",
    "Draft",
    "Figures",
    "FitPlan",
    "FitResults",
    "Limits",
    "describe",
    "fit",
    "load_fit",
]
