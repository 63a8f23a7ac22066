"""SmoothQuant: move the outliers of the activations into the weights, where they do less harm.

Start at `smooth_factors`. In: the weight of all layers that share an input, [out, in], and some of
its inputs. Out: one factor per input channel: inputs are divided by it, weight columns multiplied.
Xiao et al., arXiv 2211.10438, equation 4: s = max|x|^a / max|w|^(1-a). The paper fixes a; here each
input takes the a of least error in its layers' output, with weights and activations both rounded.
"""

import torch
from torch import Tensor

from tinier.kernels import calibrated_scale, round_activations
from tinier.quantization.awq import normalized
from tinier.quantization.scales import to_nearest
from tinier.schemes import Scheme

_STEPS = 20


def smooth_factors(weight: Tensor, absmax: Tensor, sample: Tensor, scheme: Scheme) -> Tensor:
    """Factors [in] of least output error; all ones where nothing is better than no smoothing.

    weight: [out, in]. absmax: [in], largest |x| seen. sample: [tokens, in], some of the inputs.
    """
    assert scheme.activations is not None
    weight, sample = weight.float(), sample.float()
    exact = sample @ weight.t()
    column_max = weight.abs().amax(dim=0).clamp(min=1e-12)
    best = torch.ones_like(absmax)
    least = torch.inf
    for step in range(_STEPS + 1):
        strength = step / _STEPS
        factors = torch.ones_like(absmax)
        if step:
            factors = normalized(absmax.pow(strength) / column_max.pow(1 - strength))
        rounded = to_nearest(weight * factors, scheme.weights)
        scale = calibrated_scale(scheme, absmax / factors)
        inputs = round_activations(sample / factors, scheme.activations, scale)
        total = (inputs @ rounded.t() - exact).square().sum().item()
        if total < least:
            best, least = factors, total
    return best
