"""A mixture of experts: a router sends each token through a few of many MLPs, and sums what they make.

Start at `make_experts`. On a GPU the chosen experts of all tokens are multiplied together (grouped.py).
Elsewhere, and where the experts of a layer are stored in different ways, it goes expert after expert, each
with the tokens that chose it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.kernels.linear import Linear, StoredLinear, make_linear
from tinier.kernels.machine import HAS_TRITON
from tinier.kernels.operators import gated, uses_triton
from tinier.kernels.reference import joined, through_experts
from tinier.schemes import Int4Inputs

if HAS_TRITON:
    from tinier.kernels import grouped


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    router: Linear
    """hidden to experts, in 16 bit"""
    gate_up: list[Linear]
    down: list[Linear]
    """One linear layer of each expert, or a single one over the rows of all: `are_grouped`"""
    count: int
    top_k: int
    sums_to_one: bool
    in_float32: bool
    """Whether an expert's output is multiplied with its share in float32; of those that are not grouped"""
    activation: str

    @property
    def are_grouped(self) -> bool:
        """Whether what is launched does not depend on what the router says."""
        return len(self.down) < self.count

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden] or its parts [S, T, hidden], this process's part of it."""
        if self.are_grouped:
            return self._together(x)
        return through_experts(
            x, joined(self.router(x), x.dtype), self.top_k, self._expert,
            sums_to_one=self.sums_to_one, in_float32=self.in_float32,
        )  # fmt: skip

    def _expert(self, number: int, x: Tensor) -> Tensor:
        down = self.down[number]
        act = gated(self.gate_up[number](x), x.dtype, down.takes, self.activation)
        return joined(down(act), x.dtype)

    def _together(self, x: Tensor) -> Tensor:
        (first,), (last,) = self.gate_up, self.down
        assert first.few is not None
        assert last.few is not None
        routing = grouped.route(
            self.router(x), self.top_k, sums_to_one=self.sums_to_one, dtype=x.dtype
        )
        made = grouped.matmul(first.prepared(x), first.few, routing, self.count, last=False)
        act = last.prepared(gated(made, x.dtype, last.takes, self.activation))
        parts = grouped.matmul(act, last.few, routing, self.count, last=True)
        return parts if parts.dtype == torch.float32 else parts.sum(0)


def make_experts(
    router: Tensor, mlps: list[tuple[list[StoredLinear], StoredLinear]], dtype: torch.dtype, *,
    top_k: int, sums_to_one: bool, in_float32: bool, activation: str,
    int4_inputs: Int4Inputs = "16bit",
) -> Experts:  # fmt: skip
    """router: [experts, hidden]. mlps: of each expert gate and up, and down. The others: see Experts."""
    gate_up = down = None
    if uses_triton(router.device):
        gate_up = _grouped([part for parts, _ in mlps for part in parts], len(mlps), dtype)
        down = _grouped([last for _, last in mlps], len(mlps), dtype)
    if gate_up is None or down is None:
        gate_up = [make_linear(parts, dtype, int4_inputs) for parts, _ in mlps]
        down = [make_linear([last], dtype, int4_inputs) for _, last in mlps]
    return Experts(
        router=make_linear([StoredLinear(router, None)], dtype), gate_up=gate_up, down=down,
        count=len(mlps), top_k=top_k, sums_to_one=sums_to_one, in_float32=in_float32,
        activation=activation,
    )  # fmt: skip


def _grouped(parts: list[StoredLinear], experts: int, dtype: torch.dtype) -> list[Linear] | None:
    """One linear layer over the rows of all, where it can be multiplied by expert."""
    whole = make_linear(parts, dtype)
    if whole.few is None or not grouped.fits(whole.few, experts):
        return None
    return [whole]
