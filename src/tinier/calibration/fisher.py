"""How much the model's predictions depend on each token, at the outputs of its linear layers.

Start at `token_weights`. A change of a weight row w that adds d = Δw·x to an output costs, to second order,
E[g² d²] of divergence: g is the gradient, at that output, of the log-likelihood of a token that the model
draws itself (the Fisher information). GPTQ and AWQ minimize E[d²], as if every token mattered alike. With
one weight s for all outputs of a token, the mean of g² over them, they keep their form: the second moments
of the inputs become E[s x xᵀ]. That is GuidedQuant (Kim et al. 2025, arXiv:2505.07004) with one group of
outputs.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.calibration.divergence import norm_and_head
from tinier.calibration.walk import DecoderWalk
from tinier.checkpoint import Checkpoint
from tinier.device import fast_bf16
from tinier.families import Geometry, Input, geometry_of
from tinier.kernels import rms_norm
from tinier.progress import bar
from tinier.ranks import ALONE, Ranks

STATES_BYTES = 4 << 30
"""Inputs of all layers that are kept at once, on the host"""
_CHUNK = 128
"""Tokens whose logits are held at once"""
_MOST = 20.0
"""A weight at most, in means: a few tokens would be all that counts"""


class LayerWeights(NamedTuple):
    """Of one layer; float32, of mean about 1."""

    inputs: dict[str, Tensor]
    """[n, length] by name of the input (Geometry.inputs), for the outputs of its linear layers; not of
    experts' inputs, which are tokens of their own"""
    tokens: Tensor
    """[n, length], for the layer's own outputs"""
    channels: Tensor
    """[hidden], the mean of g² over tokens there; [n, hidden] while it is summed"""

    def to_tensors(self) -> dict[str, Tensor]:
        named = {f"inputs/{name}": weights for name, weights in self.inputs.items()}
        return named | {"tokens": self.tokens, "channels": self.channels}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "LayerWeights":
        inputs = {
            n.removeprefix("inputs/"): t for n, t in tensors.items() if n.startswith("inputs/")
        }
        return cls(inputs, tensors["tokens"], tensors["channels"])


def token_weights(
    checkpoint: Checkpoint, walk: DecoderWalk, windows: Tensor, seed: int, ranks: Ranks = ALONE
) -> list[LayerWeights]:
    """Of each layer. windows: this rank's [n, length]; the result is the same however many ranks there are.
    seed: of the tokens that the model draws.

    One pass forward and one back, a layer in memory at a time.
    """
    geometry = geometry_of(checkpoint)
    found = [
        LayerWeights(
            {read.name: torch.zeros(windows.shape) for read in _inputs(geometry)},
            torch.zeros(windows.shape),
            torch.zeros(len(windows), geometry.hidden),
        )
        for _ in range(geometry.layers)
    ]
    window = windows.shape[1] * geometry.hidden * checkpoint.dtype.itemsize * geometry.layers
    # whole batches, as the ranks share them out
    at_once = max(1, STATES_BYTES // window // walk.batch_windows) * walk.batch_windows
    before = int(ranks.gather(torch.tensor([len(windows)]))[: ranks.rank].sum())
    with bar("Fisher information", 2 * geometry.layers * len(windows)) as advance:
        for first in range(0, len(windows), at_once):
            rows = slice(first, first + at_once)
            states = [walk.embed(windows[rows])]
            for index in range(geometry.layers):
                states.append(
                    walk.run(walk.load(index), states[index], torch.empty_like(states[index]))
                )
                advance(len(states[0]))
            gradient = _head_gradient(checkpoint, states.pop(), walk.device, seed + before + first)
            for index in reversed(range(geometry.layers)):
                inputs, tokens, channels = found[index]
                own = LayerWeights(
                    {n: w[rows] for n, w in inputs.items()}, tokens[rows], channels[rows]
                )
                _back(walk, walk.load(index), geometry, states.pop(), gradient, own)
                advance(len(gradient))
    mine = slice(before, before + len(windows))

    def bounded(weights: Tensor) -> Tensor:
        return _bounded(ranks.gather(weights))[mine]

    return [
        LayerWeights(
            {name: bounded(weights) for name, weights in inputs.items()},
            bounded(tokens),
            _bounded(ranks.gather(channels).sum(0)),
        )
        for inputs, tokens, channels in found
    ]


def _inputs(geometry: Geometry) -> list[Input]:
    return [read for read in geometry.inputs if geometry.expert_of(read.readers[0]) is None]


def _bounded(weights: Tensor) -> Tensor:
    mean = weights.mean()
    if not mean > 0:
        return torch.ones_like(weights)
    bounded = (weights / mean).clamp_(max=_MOST)
    return bounded / bounded.mean()


def _head_gradient(
    checkpoint: Checkpoint, hidden: Tensor, device: torch.device, seed: int
) -> Tensor:
    """Gradient of the log-likelihood of tokens that the model draws, at the last layer's outputs
    [n, length, hidden]. Products are in the model's type: only sizes matter here."""
    geometry = geometry_of(checkpoint)
    # a CPU without bf16 products would widen the head for every chunk
    dtype = checkpoint.dtype if fast_bf16(device) else torch.float32
    norm, head = norm_and_head(checkpoint, device, dtype)
    found = torch.empty_like(hidden)
    length = hidden.shape[1]
    for index, start in ((i, j) for i in range(len(hidden)) for j in range(0, length, _CHUNK)):
        if start == 0:  # each window has numbers of its own
            generator = torch.Generator(device).manual_seed(seed + index)
        rows = slice(start, start + _CHUNK)
        states = hidden[index, rows].to(device).float().requires_grad_(True)
        with torch.enable_grad():
            normed = rms_norm(states, norm.float(), geometry.norm_eps)
        divisor = geometry.multipliers.logits
        logits = F.linear(normed.detach().to(dtype), head).float() / divisor
        at_logits = logits.softmax(-1)
        drawn = _draw(at_logits, generator)
        at_logits.scatter_add_(1, drawn, at_logits.new_full(drawn.shape, -1.0))
        at_normed = F.linear(at_logits.to(dtype), head.t()).float() / divisor
        gradient = torch.autograd.grad(normed, states, at_normed)[0]
        found[index, rows] = gradient.to(found.dtype).to(found.device)
    return found


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row [rows, vocab]: [rows, 1]. With one random number a row: torch.multinomial draws
    one for every token of the vocabulary."""
    sums = probabilities.cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at).clamp_(max=sums.shape[1] - 1)


def _back(
    walk: DecoderWalk, layer: nn.Module, geometry: Geometry, inputs: Tensor, gradient: Tensor,
    into: LayerWeights,
) -> None:  # fmt: skip
    """Through one layer: `gradient` [n, length, hidden] at its outputs becomes that at its inputs, and the
    squares there, and at the outputs of its linear layers, are added to `into`."""
    rows = slice(0, 0)

    def seen(name: str, at_output: Tensor) -> None:
        into.inputs[name][rows] += at_output.float().square().sum(-1).cpu()

    def watch(name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(partial(seen, name))

    for read in _inputs(geometry):
        for reader in read.readers:
            layer.get_submodule(reader).register_forward_hook(partial(watch, read.name))
    for start in range(0, len(inputs), walk.batch_windows):
        rows = slice(start, start + walk.batch_windows)
        batch = inputs[rows].to(walk.device).requires_grad_(True)
        with torch.enable_grad():
            output = walk.forward(layer, batch)
        at_output = gradient[rows].to(walk.device)
        squares = at_output.float().square()
        into.tokens[rows] += squares.sum(-1).cpu()
        into.channels[rows] += squares.sum(1).cpu()
        gradient[rows] = torch.autograd.grad(output, batch, at_output)[0].to(gradient.device)
