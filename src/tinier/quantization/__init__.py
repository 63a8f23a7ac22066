"""Post-training quantization.

Start at `quantize` (driver.py), which walks over the layers, and `quantize_layer` (layer.py), which
strings the algorithms together: awq.py, smoothquant.py, gptq.py, learned.py, each a paper. scales.py
fits a grid to a weight.
"""

from tinier.quantization.driver import quantize, quantize_all
from tinier.quantization.plan import MIXED, NULL, QuantizePlan, needs_text, plan_quantize

__all__ = [
    "MIXED",
    "NULL",
    "QuantizePlan",
    "needs_text",
    "plan_quantize",
    "quantize",
    "quantize_all",
]
