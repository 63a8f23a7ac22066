"""Pure tensor arithmetic: grids, scales, error measures. Imports torch and nothing else.

Start at `Quantized` (integer.py) and `round_to_float` (minifloat.py). A scale always multiplies
codes: value ≈ (code - zero point) × scale.
"""

from tinier.numerics.activations import (
    quantize_tokens_e4m3,
    quantize_tokens_int8,
    round_groups_e4m3,
    round_groups_mxfp4,
    round_groups_nvfp4,
    round_static,
)
from tinier.numerics.integer import (
    Quantized,
    dequantize,
    expand,
    from_pairs,
    in_blocks,
    int_range,
    invertible,
    step_size,
    storable_scale,
    to_pairs,
)
from tinier.numerics.measures import (
    power_db,
    snr_db,
)
from tinier.numerics.minifloat import (
    E2M1_MAX,
    E4M3_MAX,
    E5M2_MAX,
    cast_e4m3,
    cast_e5m2,
    e2m1_codes,
    e2m1_values,
    e8m0_codes,
    e8m0_values,
    mx_scale,
    round_to_e2m1,
    round_to_float,
)

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "E5M2_MAX",
    "Quantized",
    "cast_e4m3",
    "cast_e5m2",
    "dequantize",
    "e2m1_codes",
    "e2m1_values",
    "e8m0_codes",
    "e8m0_values",
    "expand",
    "from_pairs",
    "in_blocks",
    "int_range",
    "invertible",
    "mx_scale",
    "power_db",
    "quantize_tokens_e4m3",
    "quantize_tokens_int8",
    "round_groups_e4m3",
    "round_groups_mxfp4",
    "round_groups_nvfp4",
    "round_static",
    "round_to_e2m1",
    "round_to_float",
    "snr_db",
    "step_size",
    "storable_scale",
    "to_pairs",
]
