"""One block of GPTQ's columns on a GPU: every row is a problem of its own, so each program takes a few.

Start at `round_block_cuda`. The plain torch version is `tinier.quantization.gptq.round_block`, where
the loop over columns is as many launches as there are operations; here it runs inside one kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinier.kernels.codes import code_kind, nearest_code

_ROWS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _block_kernel(  # type: ignore[no-untyped-def]
    weight, step, zero, upper, codes, errors, rows, columns, lowest, highest,
    kind: tl.constexpr, has_zero: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None] * columns + column[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)  # [ROWS, BLOCK]
    s = tl.load(step + at, mask=inside, other=1.0)
    z = tl.zeros((ROWS, BLOCK), tl.float32)
    if has_zero:
        z = tl.load(zero + at, mask=inside, other=0.0)
    code = tl.zeros((ROWS, BLOCK), tl.float32)
    error = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(columns):
        chosen = (column == i)[None, :]
        w_i = tl.sum(tl.where(chosen, w, 0.0), axis=1)  # [ROWS]
        s_i = tl.sum(tl.where(chosen, s, 0.0), axis=1)
        z_i = tl.sum(tl.where(chosen, z, 0.0), axis=1)
        c = nearest_code(w_i / s_i, z_i, lowest, highest, kind)
        pivot = tl.load(upper + i * columns + i)
        e = (w_i - (c - z_i) * s_i) / pivot
        later = tl.load(
            upper + i * columns + column, mask=(column > i) & (column < columns), other=0.0
        )
        w -= e[:, None] * later[None, :]
        code = tl.where(chosen, c[:, None], code)
        error = tl.where(chosen, e[:, None], error)
    tl.store(codes + at, code, mask=inside)
    tl.store(errors + at, error, mask=inside)


def round_block_cuda(
    weight: Tensor,
    step: Tensor,
    zero: Tensor | None,
    upper: Tensor,
    *,
    kind: str,
    bits: int,
    lowest: float,
    highest: float,
) -> tuple[Tensor, Tensor]:
    """Codes, and errors over their pivots, of a block of columns: both [out, columns] float32.

    weight, step, zero: [out, columns] float32. upper: [columns, columns], the block's part of the
    factor. kind, bits, lowest, highest: of the grid; a float grid reaches from -highest to highest.
    """
    rows, columns = weight.shape
    weight, step, upper = weight.contiguous(), step.contiguous(), upper.contiguous()
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    _block_kernel[(triton.cdiv(rows, _ROWS),)](
        weight, step, weight if zero is None else zero.contiguous(), upper, codes, errors,
        rows, columns, lowest, highest, code_kind(kind, bits), zero is not None,
        triton.next_power_of_2(columns), _ROWS,
    )  # fmt: skip
    return codes, errors
