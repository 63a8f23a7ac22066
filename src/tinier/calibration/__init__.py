"""Walk a decoder layer by layer over calibration text, with one layer's weights in memory.

Start at `DecoderWalk` (walk.py) and `observe` (statistics.py).
"""

from tinier.calibration.statistics import InputStatistics, KeysAndValues, observe, second_moments
from tinier.calibration.walk import (
    DecoderWalk,
    LayerStep,
    check_attention_window,
    load_whole,
    turns,
    walk,
)

__all__ = [
    "DecoderWalk",
    "InputStatistics",
    "KeysAndValues",
    "LayerStep",
    "check_attention_window",
    "load_whole",
    "observe",
    "second_moments",
    "turns",
    "walk",
]
