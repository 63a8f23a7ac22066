"""A linear layer with several LoRA adapters on it, each token of a step through its own.

y = W x + Σ_a [token has a] · s_a · B_a (A_a x). The A of all adapters are one matrix and the B another, so
that it is two small products whatever the batch is; what is between them is set to 0 where it is of another
adapter than the token's. It costs all adapters' ranks for every token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.families import Update
from tinier.kernels.linear import Linear
from tinier.kernels.reference import joined
from tinier.numerics import Quantized


class Chosen:
    """Which of a decoder's adapters each token of the step in hand has."""

    def __init__(self, count: int) -> None:
        self.count = count
        """Adapters"""
        self.of_token: Tensor | None = None
        """[T], 0: none; None: no token has one"""

    @contextmanager
    def be(self, of_token: Tensor) -> Iterator[None]:
        """As long as the block runs."""
        self.of_token = of_token
        try:
            yield
        finally:
            self.of_token = None


class AdaptedLinear(Linear):
    """One of several layers that share an input (q, k and v), with what adapters add to their rows."""

    def __init__(
        self, base: Linear, parts: Sequence[tuple[int, int, Update]], rows: int, chosen: Chosen,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """parts: number of the adapter, from 1, the first of the layer's `rows` that it changes, and
        how."""
        super().__init__(None)
        self.base, self.fast = base, base.fast
        self.path = f"{base.path}, with adapters"
        self._chosen = chosen
        self.down = torch.cat([part.down.to(device, dtype) for _, _, part in parts])  # [R, in]
        self.up = torch.zeros(rows, len(self.down), dtype=dtype, device=device)  # [rows, R]
        self.counts = torch.zeros(chosen.count + 1, len(self.down), dtype=dtype, device=device)
        """[adapters + 1, R]: 1 where a row of A is that adapter's"""
        at = 0
        for number, first, part in parts:
            rank = slice(at, at := at + len(part.down))
            self.up[first : first + len(part.up), rank] = (part.scale * part.up.float()).to(dtype)
            self.counts[number, rank] = 1

    @property
    def num_bytes(self) -> int:
        return self.base.num_bytes + super().num_bytes

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        return self._add(joined(self.base(x), x.dtype), x)

    def float32(self, x: Tensor) -> Tensor:
        return self._add(self.base.float32(x), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        if self._chosen.of_token is None:
            return y
        inner = F.linear(x, self.down) * self.counts.index_select(0, self._chosen.of_token)
        return y + F.linear(inner, self.up)
