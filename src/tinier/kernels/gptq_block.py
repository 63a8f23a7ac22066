"""One block of GPTQ's columns on a GPU: every row is a problem of its own, so each program takes a few.

Start at `round_block_cuda`. The plain torch version is `tinier.quantization.gptq.round_block`, where
the loop over columns is as many launches as there are operations; here it runs inside one kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8


@triton.jit
def round_to_even(x):  # type: ignore[no-untyped-def]
    # adding 1.5 · 2^23 leaves no bits for a fraction
    return (x + 12582912.0) - 12582912.0


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
        x = w_i / s_i
        if kind == 0:  # integers
            c = tl.minimum(tl.maximum(round_to_even(x) + z_i, lowest), highest)
        else:  # E2M1: steps of 0.5 below 2, 1 below 4, 2 above; E4M3: 3 bits after the leading one
            size = tl.minimum(tl.abs(x), highest)
            if kind == 1:
                unit = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
            else:
                # the exponent of the number, not below that of the smallest normal one, 2^-6
                bits = tl.maximum(size, 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
                unit = bits.to(tl.float32, bitcast=True) * 0.125
            c = round_to_even(size / unit) * unit
            c = tl.where(x < 0, -c, c)
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
    number = 0 if kind == "int" else 1 if bits == 4 else 2
    _block_kernel[(triton.cdiv(rows, _ROWS),)](
        weight, step, weight if zero is None else zero.contiguous(), upper, codes, errors,
        rows, columns, lowest, highest, number, zero is not None,
        triton.next_power_of_2(columns), _ROWS,
    )  # fmt: skip
    return codes, errors
