"""Post-training quantization.

Start at `quantize` (driver.py). The algorithms are one file each; `rtn` is round-to-nearest.
"""

from tinier.quantization.driver import plan_quantize, quantize

__all__ = ["plan_quantize", "quantize"]
