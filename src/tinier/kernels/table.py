"""An embedding as it is stored, and its rows as numbers: fused.embed's on a GPU, `Table.rows` elsewhere."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
        scale = self.scale[tokens].float().view(len(tokens), -1, 1)
        if self.codes.dtype == torch.uint8:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).to(torch.int8) - 8
        blocks = codes.float().view(len(tokens), scale.shape[1], -1)
        return (blocks * scale).flatten(1).to(self.dtype)
