"""What a cut would cost: the divergence it causes, measured for many cuts in one walk over the layers.

Start at `divergences`. Every cut's hidden states flow beside the original's. Cuts that are equal up to
a layer share theirs, so that trying every window of layers costs little more than the layers that come
after each.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tinier.calibration import DecoderWalk, mean_divergences
from tinier.checkpoint import Checkpoint
from tinier.families import EMBEDDING, FINAL_NORM, HEAD, geometry_of, norm_weight
from tinier.kernels import output_logits
from tinier.progress import bar
from tinier.pruning.cut import Cut

# streams of hidden states that are alive at once
_TOGETHER = 32


def divergences(
    source: Checkpoint, windows: Tensor, cuts: list[Cut], device: torch.device
) -> list[float]:
    """KL(original ‖ cut) at the output of each cut, in nats per token. windows: [n, length]."""
    found: list[float] = []
    for start in range(0, len(cuts), _TOGETHER):
        found += _divergences(source, windows, cuts[start : start + _TOGETHER], device)
    return found


@torch.no_grad()
def _divergences(
    source: Checkpoint, windows: Tensor, cuts: list[Cut], device: torch.device
) -> list[float]:
    geometry = geometry_of(source)
    walk = DecoderWalk(source, windows.shape[1], device)
    exact = walk.embed(windows)
    streams = [_Stream(source, cut, windows.shape[1], device) for cut in cuts]
    alive: dict[str, Tensor] = {}
    for stream in streams:
        kept = stream.cut.hidden
        alive[stream.past(-1)] = exact if kept is None else exact.index_select(2, kept)
    with bar("trials", geometry.layers) as advance:
        for index in range(geometry.layers):
            layer = walk.load(index)
            following: dict[str, Tensor] = {}
            for stream in streams:
                past = stream.past(index)
                if past in following:
                    continue
                before = alive[stream.past(index - 1)]
                if index not in stream.cut.layers:
                    following[past] = before
                    continue
                module = stream.layer(index, layer) if stream.is_narrow else layer
                following[past] = stream.walk.run(module, before, torch.empty_like(before))
            exact = walk.run(layer, exact, torch.empty_like(exact))
            alive = following
            advance(1)
    last = geometry.layers - 1
    with source.reader(device) as read:
        norm, head = read(FINAL_NORM), read(EMBEDDING if geometry.tied_head else HEAD).float()

    def logits(hidden: Tensor) -> Tensor:
        weight, divisor = norm_weight(norm, geometry), geometry.multipliers.logits
        return output_logits(hidden, weight, head, geometry.norm_eps, divisor)

    others = [(alive[s.past(last)], partial(s.logits, norm=norm, head=head)) for s in streams]
    return mean_divergences((exact, logits), others, device)


class _Stream:
    """One cut on its way through the layers."""

    def __init__(self, source: Checkpoint, cut: Cut, length: int, device: torch.device) -> None:
        self.cut = cut
        self._geometry = geometry_of(source)
        config = cut.config(source.config, self._geometry)
        self._eps = config["rms_norm_eps"]
        # its layers, all of them: the dropped ones are passed by, not renumbered
        whole = replace(cut, layers=tuple(range(self._geometry.layers)))
        self.is_narrow = any(
            x is not None for x in (cut.hidden, cut.neurons, cut.heads, cut.experts)
        )
        as_if = replace(source, config=whole.config(source.config, self._geometry))
        self.walk = DecoderWalk(as_if, length, device)
        # cuts in depth alone are alike as long as they dropped the same
        self._width = str(id(cut)) if self.is_narrow else ""

    def past(self, index: int) -> str:
        """Equal for streams whose hidden states after layer `index` are the same."""
        dropped = [i for i in range(index + 1) if i not in self.cut.layers]
        return f"{self._width} {dropped}"

    def layer(self, index: int, original: torch.nn.Module) -> torch.nn.Module:
        """The original's layer, cut."""
        weights = {
            renamed: self.cut.layer_tensor(index, name, tensor, self._geometry)
            for name, tensor in original.state_dict().items()
            if (renamed := self.cut.renamed_inside(index, name, self._geometry)) is not None
        }
        return self.walk.module(index, weights)

    def logits(self, hidden: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        norm = norm_weight(self.cut.tensor(FINAL_NORM, norm, self._geometry), self._geometry)
        name = EMBEDDING if self._geometry.tied_head else HEAD
        head = self.cut.tensor(name, head, self._geometry)
        return output_logits(hidden, norm, head, self._eps, self._geometry.multipliers.logits)
