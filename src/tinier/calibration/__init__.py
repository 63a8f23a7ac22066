"""Walk a decoder layer by layer over calibration text, with one layer's weights in memory.

Start at `walk`.
"""

from tinier.calibration.walk import LayerStep, check_attention_window, walk

__all__ = ["LayerStep", "check_attention_window", "walk"]
