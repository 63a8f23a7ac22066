"""The operators of the decoder: a plain torch reference for each, and the faster ways to run it.

Start at `linear.py`: `make_linear` picks, once at load, how a stored weight is multiplied on the
device at hand, and the layer says which way it took. `reference.py` has norms, RoPE and attention
over the paged KV cache.
"""

from tinier.kernels.linear import (
    Linear,
    StoredLinear,
    make_linear,
    round_activations,
    static_scale,
)
from tinier.kernels.reference import paged_attention, rms_norm, rotate, silu_mul

__all__ = [
    "Linear",
    "StoredLinear",
    "make_linear",
    "paged_attention",
    "rms_norm",
    "rotate",
    "round_activations",
    "silu_mul",
    "static_scale",
]
