"""AWQ: scale up the input channels that matter before rounding, and scale the inputs down as much.

Start at `awq_factors`. In: the weight of all layers that share an input, [out, in], and statistics of
that input. Out: one factor per input channel. Lin et al., arXiv 2306.00978, section 3.2, with the
search of the authors' code: s = mean|x|^r / mean|w|^(1-r), r from 0 to 1 in 20 steps. Layers that
share an input are searched as one, for the factors are folded into one place.

The loss of a candidate is ‖(W - Q(W·s)/s) X‖² over all calibration tokens at once: with the inputs'
second moments H = mean(x xᵀ) it is the trace of D H Dᵀ, so the tokens themselves are not needed and
what does not change between candidates is computed once.
"""

import torch
from torch import Tensor

from tinier.quantization.scales import to_nearest
from tinier.schemes import Grid

_STEPS = 20


def awq_factors(weight: Tensor, moments: Tensor, mean_abs: Tensor, grid: Grid) -> Tensor:
    """Factors [in] of least output error; all ones where nothing is better than no scaling.

    weight: [out, in]. moments: [in, in], mean of x xᵀ. mean_abs: [in], mean of |x|.
    """
    weight = weight.float()
    shares = _mean_share(weight, grid)  # [in]
    best = torch.ones_like(mean_abs)
    least = _loss(weight, best, moments, grid)
    for step in range(1, _STEPS + 1):
        ratio = step / _STEPS
        factors = mean_abs.pow(ratio) / (shares.pow(1 - ratio) + 1e-4)
        factors = normalized(factors)
        loss = _loss(weight, factors, moments, grid)
        if loss < least:
            best, least = factors, loss
    return best


def normalized(factors: Tensor) -> Tensor:
    """Factors centred on one, none of them zero or out of range."""
    factors = factors.clamp(min=1e-4)
    return (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-4, 1e4)


def _mean_share(weight: Tensor, grid: Grid) -> Tensor:
    """Mean over rows of |w| as a share of the largest weight in its group: [in]."""
    size = grid.group_size or weight.shape[1]
    groups = weight.abs().reshape(len(weight), -1, size)  # [out, groups, size]
    shares = groups / groups.amax(dim=2, keepdim=True).clamp(min=1e-12)
    return shares.flatten(1).mean(dim=0)


def _loss(weight: Tensor, factors: Tensor, moments: Tensor, grid: Grid) -> float:
    error = to_nearest(weight * factors, grid) / factors - weight
    return torch.sum((error @ moments) * error).item()
