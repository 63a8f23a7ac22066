"""Scales of least output error for codes that are chosen already.

Start at `rescaled`. GPTQ lets each column make up for the errors before it, so its codes are no longer the
nearest ones of the scales that it began with. For a row w of the weight, with codes c (less the zero point)
in groups g and inputs of second moments H, the error

    (w - Σ s_g c_g)ᵀ H (w - Σ s_g c_g)

is least where A s = b, with A_gh = c_gᵀ H c_h and b_g = c_gᵀ H w: as many unknowns as the row has groups.
"""

import torch
from torch import Tensor

from tinier.calibration import damped
from tinier.numerics import Quantized, expand, storable_scale
from tinier.schemes import Grid

# with 4 bits the divergence stays as it was (docs/log.md)
_MOST_BITS = 3
# added to the diagonal of A, in means of it: a group of zero codes leaves its scale open
_RIDGE = 1e-6
# numbers of A for the rows that are solved together
_NUMBERS = 2**26


def can_rescale(grid: Grid) -> bool:
    """Whether a grid's scales belong to one row each, are stored finely enough to be moved a little, and
    are worth it."""
    fine = grid.granularity in ("group", "channel") and grid.scale_format == "model"
    return fine and grid.bits <= _MOST_BITS


def rescaled(weight: Tensor, quantized: Quantized, moments: Tensor, damp: float) -> Quantized:
    """The same codes with other scales; in no row is the error larger than before.

    weight: [out, in]. moments: [in, in], the mean of x xᵀ over the inputs. damp: added to its diagonal, in
    means of it. Scales are compared as they are stored, and keep their signs.
    """
    hessian = damped(moments.float(), damp)
    groups = quantized.scale.shape[1]
    scale = quantized.scale.clone()
    for rows in torch.arange(len(weight), device=weight.device).split(
        max(1, _NUMBERS // (groups * groups + len(hessian)))
    ):
        target, codes = weight[rows].float(), quantized.codes[rows].float()
        if quantized.zero_point is not None:
            codes -= expand(quantized.zero_point[rows].float(), codes.shape)
        products = target @ hessian
        solved = _solved(codes, products, hessian, groups)
        old = scale[rows]
        # where nothing says what the scale should be, or the stored type cannot hold it, it stays
        keeps = solved.isfinite() & (solved.sign() == old.float().sign())
        new = torch.where(keeps, storable_scale(solved, scale.dtype), old)
        before, after = (_error(target, codes, s.float(), hessian) for s in (old, new))
        scale[rows] = torch.where((after < before)[:, None], new, old)
    return quantized._replace(scale=scale)


def _solved(codes: Tensor, products: Tensor, hessian: Tensor, groups: int) -> Tensor:
    """[rows, groups] from codes and w H, both [rows, in]."""
    rows, columns = codes.shape
    size = columns // groups
    a = torch.empty(rows, groups, groups, device=codes.device)
    for group in range(groups):
        inside = slice(group * size, (group + 1) * size)
        row = (codes[:, inside] @ hessian[inside]).mul_(codes)
        a[:, group] = row.unflatten(1, (groups, size)).sum(dim=2)
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(a.dtype).tiny
    b = (products * codes).unflatten(1, (groups, size)).sum(dim=2)
    solved: Tensor = torch.linalg.solve_ex(a, b)[0]
    return solved


def _error(target: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """[rows]"""
    lost = target - codes * expand(scale, codes.shape)
    return ((lost @ hessian) * lost).sum(dim=1)
