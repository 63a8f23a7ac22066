"""Let what is left stand in for what goes, by least squares: no gradients, one walk over the layers.

Start at `refitted`. The two linear layers that write to the residual stream can be solved for. With
their kept inputs x, and y what the original wrote there,

    W' = argmin  E|W' x - y|² + |(W' - W) D|²  =  (E[y xᵀ] + W D²) (E[x xᵀ] + D²)⁻¹

with D² = λ diag E[x xᵀ], which a few tokens of huge inputs cannot decide.
After neurons or heads were removed, y is what the whole layer wrote (He et al., arXiv 1707.06168).
Before layers that were dropped, y is what those wrote too (ReplaceMe, arXiv 2505.02819, which fits one
matrix behind the MLP; here all of `down_proj` is free). Where nothing was removed W' is W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tinier.calibration import DecoderWalk, second_moments
from tinier.checkpoint import Checkpoint
from tinier.families import Geometry, geometry_of, layer_name
from tinier.progress import bar
from tinier.pruning.cut import Cut, head_channels

# λ: measured at 0.03 to 0.1 alike; less overfits where text is short (docs/log.md)
_DAMPING = 0.1
_MLP, _ATTENTION = "mlp.down_proj", "self_attn.o_proj"


def linears_to_refit(cut: Cut, geometry: Geometry) -> dict[int, list[str]]:
    """Which linear layers can make up for what goes, by layer of the source."""
    found: dict[int, list[str]] = {}
    for layer, following in zip(cut.layers, (*cut.layers[1:], geometry.layers), strict=True):
        names = [_ATTENTION] if cut.heads else []
        if cut.neurons or following > layer + 1:
            names.append(_MLP)
        if names:
            found[layer] = names
    return found


@torch.no_grad()
def refitted(
    source: Checkpoint, cut: Cut, windows: Tensor, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The weights that stand in, by their name in the source, already cut; in its type, on the host.

    windows: [n, length] of calibration text. One layer's weights are in memory at a time, and the
    moments of its inputs, [in, in] in float64.
    """
    geometry = geometry_of(source)
    todo = linears_to_refit(cut, geometry)
    if not todo:
        return
    walk = DecoderWalk(source, windows.shape[1], device)
    hidden = walk.embed(windows)
    ends = dict(zip(cut.layers, (*cut.layers[1:], geometry.layers), strict=True))
    with bar("refit", max(ends[layer] for layer in todo)) as advance:
        advance(cut.layers[0])
        for index in range(cut.layers[0]):
            hidden = walk.run(walk.load(index), hidden, hidden)
        for index in range(cut.layers[0], max(todo) + 1):
            if index not in ends:
                continue
            layer = walk.load(index)
            outputs = walk.run(layer, hidden, torch.empty_like(hidden))
            for dropped in range(index + 1, ends[index]):
                outputs = walk.run(walk.load(dropped), outputs, outputs)
            for name in todo.get(index, ()):
                # what the dropped layers wrote is the MLP's to make up for
                target = outputs if name == _MLP and ends[index] > index + 1 else None
                moments = _observe(walk, layer, name, hidden, target)
                weight = layer.get_submodule(name).weight
                solved = _solve(moments, weight, _kept_inputs(cut, index, name, geometry))  # type: ignore[arg-type]
                if cut.hidden is not None:
                    solved = solved[cut.hidden.to(device)]
                yield f"{layer_name(index)}.{name}.weight", solved.to(source.dtype).cpu()
            hidden = outputs
            advance(ends[index] - index)


@dataclass(frozen=True, slots=True)
class _Moments:
    inputs: Tensor
    """[in, in] float64: E[x xᵀ]"""
    beyond: Tensor | None
    """[in, hidden] float64: E[x dᵀ], d what the dropped layers wrote"""


def _observe(
    walk: DecoderWalk, layer: nn.Module, name: str, hidden: Tensor, target: Tensor | None
) -> _Moments:
    """Send the layer's inputs through it once more and add up the moments of one linear layer.

    hidden: [n, length, hidden]. target: what should come out, where that is not what does.
    """
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    sums = partial(torch.zeros, dtype=torch.float64, device=walk.device)
    width = linear.in_features
    inputs = sums(width, width)
    beyond = None
    if target is not None:
        beyond = sums(width, hidden.shape[-1])
    for start in range(0, len(hidden), walk.batch_windows):
        rows = slice(start, start + walk.batch_windows)
        output = walk.forward(layer, hidden[rows].to(walk.device))
        x = seen.pop()
        inputs += second_moments(x)
        if beyond is not None:
            assert target is not None
            missing = target[rows].to(walk.device).float() - output.float()
            beyond += x.float().t() @ missing.flatten(0, 1)
    handle.remove()
    tokens = hidden.shape[0] * hidden.shape[1]
    return _Moments(inputs / tokens, None if beyond is None else beyond / tokens)


def _solve(moments: _Moments, weight: Tensor, kept: Tensor | None) -> Tensor:
    """[out, kept] float64 of the docstring above. weight: [out, in]. kept: indices of inputs."""
    weight = weight.double()
    wanted = moments.inputs @ weight.t()
    if moments.beyond is not None:
        wanted = wanted + moments.beyond
    inputs = moments.inputs
    if kept is not None:
        kept = kept.to(weight.device)
        inputs, wanted, weight = inputs[kept][:, kept], wanted[kept], weight[:, kept]
    damping = torch.diag(_DAMPING * inputs.diagonal().clamp(min=torch.finfo(torch.float32).tiny))
    factor = torch.linalg.cholesky(inputs + damping)
    return torch.cholesky_solve(wanted + damping @ weight.t(), factor).t()


def _kept_inputs(cut: Cut, layer: int, name: str, geometry: Geometry) -> Tensor | None:
    if name == _ATTENTION:
        return head_channels(cut.heads[layer], geometry.head_dim) if cut.heads else None
    return cut.neurons[layer] if cut.neurons else None
