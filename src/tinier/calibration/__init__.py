"""Walk a decoder layer by layer over calibration text, with one layer's weights in memory.

Start at `walk`.
"""

from tinier.calibration.walk import LayerStep, walk

__all__ = ["LayerStep", "walk"]
