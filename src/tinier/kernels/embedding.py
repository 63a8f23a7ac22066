"""How a stored embedding is kept on the device at hand.

`make_table` keeps what is stored; `table_of` reads the weight of a head that is tied to it, so that both
are in memory once.
"""

import torch
from torch import Tensor

from tinier.kernels import native
from tinier.kernels.linear import (
    DenseLinear,
    Fp8Linear,
    Int8Linear,
    Linear,
    NativeLinear,
    StoredLinear,
    WeightOnlyLinear,
)
from tinier.kernels.machine import HAS_TRITON, machine_of
from tinier.kernels.table import Table
from tinier.numerics import dequantize

if HAS_TRITON:
    from tinier.kernels import skinny


def make_table(stored: StoredLinear, dtype: torch.dtype) -> Table:
    """The embedding [vocab, hidden] on the device that it is on; formats that no lookup reads become
    numbers."""
    weight, scheme = stored.weight, stored.scheme
    if isinstance(weight, Tensor):
        return Table(weight.to(dtype), None, weight.shape[1], dtype)
    assert scheme is not None
    grid, machine = scheme.weights, machine_of(weight.codes.device)
    hidden, on_gpu = weight.codes.shape[1], machine.runs_triton
    if grid.bits == 8 and grid.granularity == "channel" and grid.symmetric:
        if grid.kind == "int" or machine.has_fp8 or not on_gpu:
            return Table(weight.codes, weight.scale.float().reshape(-1), hidden, dtype)
    elif grid.bits == 4 and grid.kind == "int" and grid.symmetric and weight.scale.shape[1] > 1:
        if on_gpu:
            scale = weight.scale.to(dtype).t().contiguous()
            return Table(skinny.pack_int4(weight.codes), scale, hidden, dtype)
        pairs = native.pack_int4(weight, None, native.AS_THEY_ARE)
        return Table(pairs.weight, pairs.scale, hidden, dtype)
    return Table(dequantize(weight, dtype), None, hidden, dtype)


def table_of(head: Linear, dtype: torch.dtype) -> Table | None:
    """The weight of a head, in place; None where it is laid out for products alone."""
    if isinstance(head, DenseLinear):
        return Table(head.weight, None, head.weight.shape[1], dtype)
    if isinstance(head, Int8Linear):
        codes = head.codes.t()[: len(head.scale)]
        return Table(codes, head.scale, codes.shape[1], dtype)
    if isinstance(head, Fp8Linear):
        codes = head.codes.t()[: head.rows]
        return Table(codes, head.scale.squeeze(0)[: head.rows], codes.shape[1], dtype)
    if isinstance(head, NativeLinear) and head.weight.zero is None:
        return Table(head.weight.weight, head.weight.scale, head.weight.shape[1], dtype)
    if isinstance(head, WeightOnlyLinear):
        return Table(head.weight.codes, head.weight.scale, head.weight.shape[1], dtype)
    return None
