"""Draws tokens from logits: temperature, min-p, top-k and top-p, then a race of random numbers.

Start at `draw`. In: logits [R, vocab], limits and keys [R, 2]. Out: tokens [R]. Nothing waits for the
device, nothing is sorted, and a row's draw does not depend on the other rows: what the limits keep is
counted in whole multiples of 2^-40 of the likeliest token's probability, and sums of integers do not
depend on their order.

Of the tokens that are kept the one with the greatest logit / temperature + noise is drawn, where the noise
of each follows Gumbel's distribution: this draws by probability. The noise depends on seed, position and
token alone, so two models that are nearly of one mind draw the same token nearly always: a draft is right
more often (drafts.py) than where both would look up one number in their cumulative probabilities.

Among equally likely tokens those with the lowest ids count as the most likely ones.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinier.kernels import gumbel, uses_triton

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

    @property
    def by_temperature(self) -> bool:
        """Whether there is no other limit."""
        return self.min_p is None and self.top_k is None and self.top_p is None


def keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.int32]:
    """[n, 2] random bits for each seed and position: those of splitmix64, started at the mixed seed."""
    step = np.uint64(0x9E3779B97F4A7C15)
    start = _mixed(seeds + step)
    bits = _mixed(start + (positions + np.uint64(1)) * step)
    return np.ascontiguousarray(bits).view(np.int32).reshape(-1, 2)


def draw(logits: Tensor, limits: Limits, row_keys: Tensor) -> Tensor:
    """A token of each row, by probability.

    logits: [R, vocab] float32; row_keys: [R, 2] int32, of `keys`. Returns [R] int64.
    """
    gaps = logits.amax(dim=-1, keepdim=True) - logits
    gaps = torch.where(gaps >= 0, gaps, torch.inf)  # what is not a number is not drawn
    scaled = gaps / limits.temperature
    kept = _within(gaps, scaled, limits)
    scores = noise(row_keys, logits.shape[-1]).sub_(scaled)
    return (scores if kept is None else scores.masked_fill_(~kept, -torch.inf)).argmax(dim=-1)


def noise(row_keys: Tensor, vocab: int) -> Tensor:
    """[R, vocab] float32 of Gumbel's distribution, -log(-log(u)) for u uniform between 0 and 1."""
    if uses_triton(row_keys.device):
        return gumbel(row_keys, vocab)
    mix, add = row_keys[:, :1] | 1, row_keys[:, 1:]
    bits = _scrambled((_token_bits(vocab, row_keys.device) * mix).bitwise_xor_(add))
    # 31 bits, of which float32 keeps the first 24: all that small ones have, and those win a race
    below = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return below.neg_().log1p_().neg_().log_().neg_()


@lru_cache(maxsize=8)
def _token_bits(vocab: int, device: torch.device) -> Tensor:
    """[1, vocab] int32: random bits of each token's own."""
    tokens = torch.arange(vocab, dtype=torch.int32, device=device)
    return _scrambled(tokens.mul_(-1640531527)).unsqueeze(0)


def _scrambled(bits: Tensor) -> Tensor:
    """int32 in place through the finalizer of MurmurHash3, in which each bit changes all others."""
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(-2048144789)
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(-1028477387)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _within(gaps: Tensor, scaled: Tensor, limits: Limits) -> Tensor | None:
    """Marks what min-p, top-k and top-p keep; None: all. gaps: to the greatest logit; scaled: over the
    temperature. [R, vocab] float32."""
    if limits.by_temperature:
        return None
    ranks = gaps.view(torch.int32)  # in the same order, since no gap is negative
    weights = torch.exp(-scaled)
    if limits.min_p is not None:
        weights = torch.where(weights >= limits.min_p, weights, 0)
    if limits.top_k is not None:
        kept = most_likely(ranks, (weights > 0).long(), limits.top_k)
        weights = torch.where(kept, weights, 0)
    if limits.top_p is None:
        return weights > 0
    masses = (weights * _MASS).long()
    need = (masses.sum(dim=-1, keepdim=True) * limits.top_p).ceil().long()
    return most_likely(ranks, masses, need) & (masses > 0)


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
