"""Draws tokens from logits: temperature, min-p, top-k and top-p, with one uniform number per row.

Start at `draw`. In: logits [R, vocab], limits and uniform numbers [R, 1]. Out: tokens [R]. Nothing waits
for the device, nothing is sorted, and a row's draw is the same bit for bit whatever the other rows are:
probabilities are whole multiples of 2^-40 of the likeliest token's, and sums of integers do not depend
on their order.

Among equally likely tokens those with the lowest ids count as the most likely ones.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# of the likeliest token; 2^18 tokens of it add up to 2^58
_MASS = 2.0**40
# the 31 bits of a number that is not negative, as digits: shift and width of each
_DIGITS = ((20, 11), (10, 10), (0, 10))


class Limits(NamedTuple):
    """How each row is drawn, [R, 1] each; None: no row has that limit."""

    temperature: Tensor
    """float32, above 0"""
    min_p: Tensor | None
    """float32"""
    top_k: Tensor | None
    """int64, 1 or more"""
    top_p: Tensor | None
    """float64"""


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each seed and position: those of splitmix64, started at the mixed seed."""
    step = np.uint64(0x9E3779B97F4A7C15)
    start = _mixed(seeds + step)
    bits = _mixed(start + (positions + np.uint64(1)) * step)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, limits: Limits, uniform: Tensor) -> Tensor:
    """The token at which a row's cumulative probability, in order of ids, passes its uniform number.

    logits: [R, vocab] float32; uniform: [R, 1] float64. Returns [R] int64.
    """
    gaps = logits.amax(dim=-1, keepdim=True) - logits
    gaps = torch.where(gaps >= 0, gaps, torch.inf)  # what is not a number is not drawn
    ranks = gaps.view(torch.int32)  # in the same order, since no gap is negative
    weights = torch.exp(-gaps / limits.temperature)
    if limits.min_p is not None:
        weights = torch.where(weights >= limits.min_p, weights, 0)
    if limits.top_k is not None:
        kept = most_likely(ranks, (weights > 0).long(), limits.top_k)
        weights = torch.where(kept, weights, 0)
    masses = (weights * _MASS).long()
    if limits.top_p is not None:
        need = (masses.sum(dim=-1, keepdim=True) * limits.top_p).ceil().long()
        masses = torch.where(most_likely(ranks, masses, need), masses, 0)
    upto = masses.cumsum(dim=-1)
    total = upto[:, -1:]
    target = torch.minimum((total * uniform).long(), total - 1)
    return torch.searchsorted(upto, target, right=True).squeeze(1)


def most_likely(ranks: Tensor, masses: Tensor, need: Tensor) -> Tensor:
    """Marks the lowest ranked tokens, as few as have `need` of the mass together; of equal ranks the
    lowest ids.

    ranks: [R, vocab] int32, 0 or more; masses: [R, vocab] int64; need: [R, 1] int64. The rank where the
    sum is reached is found digit by digit: the mass of each value of the digit, among those that have
    the digits before it.
    """
    rows = len(ranks)
    need = torch.minimum(need, masses.sum(dim=-1, keepdim=True))
    edge = ranks.new_zeros(rows, 1)
    before = torch.zeros_like(need)  # mass of the ranks below all that begin like `edge`
    for shift, width in _DIGITS:
        begins = (ranks >> (shift + width)) == edge
        digit = ((ranks >> shift) & (2**width - 1)).long()
        sums = masses.new_zeros(rows, 2**width)
        sums.scatter_add_(1, digit, torch.where(begins, masses, 0))
        upto = before + sums.cumsum(dim=-1)
        found = torch.searchsorted(upto, need)
        before = (upto - sums).gather(1, found)
        edge = (edge << width) | found.int()
    tied = ranks == edge
    tied_masses = torch.where(tied, masses, 0)
    earlier = before + tied_masses.cumsum(dim=-1) - tied_masses
    return (ranks < edge) | (tied & (earlier < need))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
