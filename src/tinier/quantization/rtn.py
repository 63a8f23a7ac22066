"""Round-to-nearest: each weight to the nearest code, each scale from the largest weight it covers.

Start at `rtn`. In: a weight [out, in] and a grid. Out: codes and scales. Needs no data; what every
other algorithm has to beat.
"""

import torch
from torch import Tensor

from tinier.numerics import Quantized, round_to_e4m3, round_to_int
from tinier.schemes import Grid


def rtn(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Quantized:
    """Nearest codes on `grid`. weight: [out, in]; scales are stored in `scale_dtype`."""
    if grid.kind == "float":
        return round_to_e4m3(weight, scale_dtype=scale_dtype)
    return round_to_int(weight, bits=grid.bits, group_size=grid.group_size, scale_dtype=scale_dtype)
