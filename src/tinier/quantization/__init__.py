"""Post-training quantization.

Start at `quantize` (driver.py), which walks over the layers, and `quantize_layer` (layer.py), which
strings the algorithms together: awq.py, smoothquant.py, gptq.py, learned.py, each a paper. scales.py
fits a grid to a weight. fake.py is what quantization-aware training needs of a grid.
"""

from tinier.quantization.driver import quantize, quantize_all, read_targets
from tinier.quantization.fake import FakeWeight, fake_cache, fake_inputs, trainable_weight
from tinier.quantization.plan import (
    MIXED,
    MIXED_BEST,
    NULL,
    QuantizePlan,
    needs_text,
    plan_quantize,
)

__all__ = [
    "MIXED",
    "MIXED_BEST",
    "NULL",
    "FakeWeight",
    "QuantizePlan",
    "fake_cache",
    "fake_inputs",
    "needs_text",
    "plan_quantize",
    "quantize",
    "quantize_all",
    "read_targets",
    "trainable_weight",
]
