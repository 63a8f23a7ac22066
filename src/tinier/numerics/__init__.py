"""Pure tensor arithmetic: grids, scales, error measures. Imports torch and nothing else.

Start at `round_to_int` (integer.py) and `round_to_e4m3` (minifloat.py). A scale always multiplies
codes: value ≈ code × scale.
"""

from tinier.numerics.integer import Quantized, dequantize, int_range, quantize_tokens_int8
from tinier.numerics.integer import round_to_int as round_to_int
from tinier.numerics.measures import snr_db
from tinier.numerics.minifloat import E4M3_MAX, quantize_tokens_e4m3, round_to_e4m3

__all__ = [
    "E4M3_MAX",
    "Quantized",
    "dequantize",
    "int_range",
    "quantize_tokens_e4m3",
    "quantize_tokens_int8",
    "round_to_e4m3",
    "round_to_int",
    "snr_db",
]
