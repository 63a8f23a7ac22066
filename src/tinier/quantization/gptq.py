"""GPTQ: round one column at a time and let the columns not yet rounded make up for its error.

Start at `gptq`. In: a weight [out, in], the fit of its grid and the Hessian of its inputs. Out: the
codes. Frantar et al., arXiv 2210.17323, algorithm 1, with the inverse's Cholesky factor and lazy
updates by blocks of columns. Columns go in order of falling importance (static act-order): the fit
belongs to the groups as they lie in memory, so nothing has to be reordered when the model runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tinier.calibration import damped
from tinier.errors import InputError
from tinier.numerics import Quantized, expand
from tinier.quantization.scales import Fit, round_scaled, stored_codes
from tinier.schemes import Grid

_BLOCK = 128
DAMP = 0.01
_DAMPS = (DAMP, 0.03, 0.1, 0.3, 1.0)


class Inverse:
    """The factor of the inverse Hessian that GPTQ walks along; one serves all layers of one input.

    hessian: [in, in] float32, the mean of x xᵀ over the inputs (any positive multiple does).
    """

    def __init__(self, hessian: Tensor) -> None:
        diagonal = hessian.diagonal()
        self.order = torch.argsort(diagonal, descending=True, stable=True)
        self.dead = diagonal <= 0
        h = hessian[self.order][:, self.order].clone()
        h.diagonal()[self.dead[self.order]] = 1.0
        for damp in _DAMPS:
            lower, failed = torch.linalg.cholesky_ex(damped(h, damp))
            if failed:
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                break
        else:
            raise InputError(
                "GPTQ cannot invert the second moments of a layer's inputs at any damping: they are "
                "damaged, or the calibration text is too uniform. Use another text, or a preset without "
                "GPTQ."
            )
        self.damp = damp
        """Share of the mean diagonal that was added: 0.01 unless the factorization needed more."""
        self.upper: Tensor = upper
        """[in, in], rows and columns in `order`"""


def gptq(weight: Tensor, inverse: Inverse, fit: Fit, grid: Grid) -> Quantized:
    """Codes for weight [out, in] that keep weight·x, for the inputs behind `inverse`."""
    order = inverse.order
    w = weight.float()[:, order].clone()
    w[:, inverse.dead[order]] = 0.0
    step = expand(fit.step, weight.shape)[:, order]
    zero = None
    if fit.zero_point is not None:
        zero = expand(fit.zero_point.float(), weight.shape)[:, order]
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, w.shape[1]))
        codes[:, block], errors = _block_rounding(w.device)(
            w[:, block],
            step[:, block],
            None if zero is None else zero[:, block],
            inverse.upper[block, block],
            grid,
        )
        w[:, block.stop :] -= errors @ inverse.upper[block, block.stop :]
    return Quantized(stored_codes(codes[:, torch.argsort(order)], grid), *fit)


def round_block(
    w: Tensor, step: Tensor, zero: Tensor | None, upper: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Codes of one block of columns, and each column's error over its pivot: both [out, columns]."""
    w = w.t().contiguous()  # [columns, out]: a column is one row of memory
    step = step.t().contiguous()
    zero = None if zero is None else zero.t().contiguous()
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for i in range(w.shape[0]):
        offset = None if zero is None else zero[i]
        code = round_scaled(w[i] / step[i], grid, offset)
        value = code if offset is None else code - offset
        torch.sub(w[i], value * step[i], out=errors[i]).div_(upper[i, i])
        w[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1.0)
        codes[i] = code
    return codes.t(), errors.t()


def _round_block_gpu(
    w: Tensor, step: Tensor, zero: Tensor | None, upper: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    assert grid.kind != "e5m2", "no preset runs GPTQ on E5M2"
    from tinier.kernels.gptq_block import round_block_cuda  # Triton is there on GPU machines only

    lowest, highest = grid.code_range
    return round_block_cuda(
        w, step, zero, upper, kind=grid.kind, bits=grid.bits, lowest=lowest, highest=highest
    )


def _block_rounding(
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor, Grid], tuple[Tensor, Tensor]]:
    return _round_block_gpu if device.type == "cuda" else round_block
