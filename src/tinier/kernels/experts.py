"""A mixture of experts: a router sends each token through a few of many MLPs, and sums what they make.

Here expert after expert, each with the tokens that chose it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.kernels.linear import Linear
from tinier.kernels.operators import gated
from tinier.kernels.reference import joined, route


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
        shares, chosen = route(F.linear(x, self.router), self.top_k, sums_to_one=self.sums_to_one)
        if not self.in_float32:
            shares = shares.to(x.dtype)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            down = self.down[number]
            act = gated(self.gate_up[number](x[token]), x.dtype, down.takes, self.activation)
            made = joined(down(act), x.dtype) * shares[token, place, None]
            out.index_add_(0, token, made.to(out.dtype))
        return out
