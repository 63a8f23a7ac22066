"""A mixture of experts: a router sends each token through a few of many MLPs, and sums what they make.

Here expert after expert, each with the tokens that chose it.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tinier.kernels.linear import Linear
from tinier.kernels.operators import gated
from tinier.kernels.reference import joined, through_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    router: Tensor
    """[experts, hidden], in 16 bit"""
    gate_up: list[Linear]
    down: list[Linear]
    top_k: int
    sums_to_one: bool
    in_float32: bool
    """Whether an expert's output is multiplied with its share in float32"""
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden], this process's part of it."""
        return through_experts(
            x, F.linear(x, self.router), self.top_k, self._expert,
            sums_to_one=self.sums_to_one, in_float32=self.in_float32,
        )  # fmt: skip

    def _expert(self, number: int, x: Tensor) -> Tensor:
        down = self.down[number]
        act = gated(self.gate_up[number](x), x.dtype, down.takes, self.activation)
        return joined(down(act), x.dtype)
