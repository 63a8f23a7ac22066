"""An embedding as it is stored, and its rows as numbers: fused.embed's on a GPU, `Table.rows` elsewhere."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.numerics import Quantized, dequantize, from_pairs


class Table(NamedTuple):
    """An embedding [vocab, hidden]."""

    codes: Tensor
    """[vocab, hidden] numbers in `dtype`, INT8 or 8-bit floats; INT4: [vocab, hidden/2] uint8 as
    native.pack_int4, or int32 as skinny.pack_int4 lays them out"""
    scale: Tensor | None
    """[vocab] float32; INT4: [vocab, groups], in skinny's layout [groups, vocab]; None: numbers"""
    hidden: int
    dtype: torch.dtype
    """Of the rows that are looked up"""

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def rows(self, tokens: Tensor) -> Tensor:
        """[T, hidden] for tokens [T]; not from skinny's layout."""
        if self.scale is None:
            return F.embedding(tokens, self.codes)
        # torch gathers no 8-bit floats
        codes = self.codes.view(torch.uint8)[tokens].view(self.codes.dtype)
        if self.codes.dtype == torch.uint8:
            codes = from_pairs(codes).to(torch.int8) - 8
        scale = self.scale[tokens].view(len(tokens), -1)
        return dequantize(Quantized(codes, scale), self.dtype)
