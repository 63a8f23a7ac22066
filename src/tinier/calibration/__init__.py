"""Walk a decoder layer by layer over calibration text, with one layer's weights in memory.

Start at `DecoderWalk` (walk.py), `observe` (statistics.py), `token_weights` (fisher.py), `Drift` (drift.py)
and `mean_divergences` (divergence.py).
"""

from tinier.calibration.divergence import mean_divergences, norm_and_head
from tinier.calibration.drift import Drift, DriftSums, reaches
from tinier.calibration.fisher import LayerWeights, token_weights
from tinier.calibration.statistics import (
    InputStatistics,
    KeysAndValues,
    damped,
    observe,
    second_moments,
)
from tinier.calibration.walk import (
    DecoderWalk,
    LayerStep,
    cache_keyword,
    check_attention_window,
    load_whole,
    turns,
    walk,
)

__all__ = [
    "DecoderWalk",
    "Drift",
    "DriftSums",
    "InputStatistics",
    "KeysAndValues",
    "LayerStep",
    "LayerWeights",
    "cache_keyword",
    "check_attention_window",
    "damped",
    "load_whole",
    "mean_divergences",
    "norm_and_head",
    "observe",
    "reaches",
    "second_moments",
    "token_weights",
    "turns",
    "walk",
]
