"""The operators of the decoder: a plain torch reference for each, and the faster ways to run it.

Start at `linear.py`: `make_linear` picks, once at load, how a stored weight is multiplied on the
device at hand, and the layer says which way it took. `operators.py` has norms, RoPE and attention over
the paged KV cache: Triton's on a GPU (fused.py, attention.py), reference.py's elsewhere.
"""

from tinier.kernels.embedding import make_table, table_of
from tinier.kernels.experts import Experts, make_experts
from tinier.kernels.layer import Layer
from tinier.kernels.linear import (
    Linear,
    StoredLinear,
    calibrated_scale,
    make_linear,
    round_activations,
    static_scale,
)
from tinier.kernels.operators import (
    add_rms_norm,
    cached_attention,
    captures,
    drawn,
    embed,
    gated,
    greedy,
    gumbel,
    norm_all_heads,
    side_by_side,
    uses_triton,
)
from tinier.kernels.peers import Peers, open_peers
from tinier.kernels.reference import (
    LONG_CONTEXT,
    Cache,
    HeadInputs,
    PagedBatch,
    joined,
    known_tokens,
    output_logits,
    rms_norm,
    through_experts,
)
from tinier.kernels.table import Table

__all__ = [
    "LONG_CONTEXT",
    "Cache",
    "Experts",
    "HeadInputs",
    "Layer",
    "Linear",
    "PagedBatch",
    "Peers",
    "StoredLinear",
    "Table",
    "add_rms_norm",
    "cached_attention",
    "calibrated_scale",
    "captures",
    "drawn",
    "embed",
    "gated",
    "greedy",
    "gumbel",
    "joined",
    "known_tokens",
    "make_experts",
    "make_linear",
    "make_table",
    "norm_all_heads",
    "open_peers",
    "output_logits",
    "rms_norm",
    "round_activations",
    "side_by_side",
    "static_scale",
    "table_of",
    "through_experts",
    "uses_triton",
]
