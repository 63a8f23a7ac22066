"""Let what is left stand in for what goes, by least squares: no gradients, one walk over the layers.

Start at `refitted`. The two linear layers that write to the residual stream can be solved for. With
their kept inputs x, and y what the original wrote there,

    W' = argmin  E|W' x - y|² + |(W' - W) D|²  =  (E[y xᵀ] + W D²) (E[x xᵀ] + D²)⁻¹

with D² = λ diag E[x xᵀ], which a few tokens of huge inputs cannot decide.
After neurons or heads were removed, y is what the whole layer wrote (He et al., arXiv 1707.06168).
Before layers that were dropped, y is what those wrote too (ReplaceMe, arXiv 2505.02819, which fits one
matrix behind the MLP; here all of `down_proj` is free). Where nothing was removed W' is W.

Of a mixture the experts that stay are solved for one after the other: W adds, times the tokens' new shares,
what all of them together still lack of what the original experts wrote.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinier.calibration import DecoderWalk, second_moments
from tinier.calibration.experts import Expert, Experts
from tinier.checkpoint import Checkpoint
from tinier.families import Geometry, geometry_of, layer_name
from tinier.kernels.reference import shares_of
from tinier.progress import bar
from tinier.pruning.cut import Cut, take

# λ: measured at 0.03 to 0.1 alike; less overfits where text is short (docs/log.md)
_DAMPING = 0.1
_MLP, _ATTENTION = "mlp.down_proj", "self_attn.o_proj"


def linears_to_refit(cut: Cut, geometry: Geometry) -> dict[int, list[str]]:
    """Which linear layers can make up for what goes, by layer of the source."""
    found: dict[int, list[str]] = {}
    for layer, following in _following(cut, geometry).items():
        names = [_ATTENTION] if cut.heads else []
        # behind a norm what the dropped layers wrote is no linear function of the weights, and no one
        # expert writes for all tokens
        linear = geometry.norm_names.mlp_out is None and geometry.mixture is None
        dropped = following > layer + 1 and linear
        if geometry.mixture is not None:
            names += _last_of_experts(cut, layer, geometry)
        elif cut.neurons or dropped:
            names.append(_MLP)
        if names:
            found[layer] = names
    return found


def _last_of_experts(cut: Cut, layer: int, geometry: Geometry) -> list[str]:
    """The last linear layer of each expert that stays, where experts or their neurons go."""
    if not (cut.neurons or cut.experts):
        return []
    names = [last.readers[0] for _, last in geometry.blocks[1:]]
    return [names[i] for i in cut.experts[layer].tolist()] if cut.experts else names


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
    following = _following(cut, geometry)
    first, last = cut.layers[0], max(todo)
    walk = DecoderWalk(source, windows.shape[1], device)
    hidden = walk.embed(windows)
    with bar("refit", following[last]) as advance:
        for index in range(first):
            hidden = walk.run(walk.load(index), hidden, hidden)
            advance(1)
        for index in range(first, last + 1):
            if index not in following:
                continue
            layer = walk.load(index)
            outputs = torch.empty_like(hidden)
            names = [n for n in todo.get(index, []) if geometry.expert_of(n) is None]
            mixed: list[tuple[Tensor, Tensor]] = []
            if len(names) < len(todo.get(index, [])):
                _watch_mixture(layer, geometry, mixed)
            moments = _input_moments(walk, layer, names, hidden, outputs)
            if mixed:
                x, y = (torch.cat(parts) for parts in zip(*mixed, strict=True))
                for name, solved in _solved_experts(layer, geometry, cut, index, x, y):
                    yield f"{layer_name(index)}.{name}.weight", solved.to(source.dtype).cpu()
            reached = outputs
            for dropped in range(index + 1, following[index]):
                reached = walk.run(walk.load(dropped), reached, torch.empty_like(reached))
            for name, inputs in moments.items():
                beyond = None
                behind_norm = geometry.norm_names.mlp_out is not None
                if name == _MLP and following[index] > index + 1 and not behind_norm:
                    beyond = _products_beyond(walk, layer, hidden, outputs, reached)
                    beyond /= geometry.multipliers.residual  # what the layer writes is multiplied
                rows, columns = cut.linear_channels(index, name, geometry)
                solved = _solve(inputs, beyond, _linear(layer, name).weight, columns)
                solved = take(solved, 0, rows)
                yield f"{layer_name(index)}.{name}.weight", solved.to(source.dtype).cpu()
            hidden = reached
            advance(following[index] - index)


def _following(cut: Cut, geometry: Geometry) -> dict[int, int]:
    """The kept layer after each kept layer; after the last one, the number of layers."""
    return dict(zip(cut.layers, (*cut.layers[1:], geometry.layers), strict=True))


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _input_moments(
    walk: DecoderWalk, layer: nn.Module, names: list[str], hidden: Tensor, outputs: Tensor
) -> dict[str, Tensor]:
    """Run the layer from `hidden` [n, length, hidden] into `outputs`; meanwhile E[x xᵀ], [in, in] in
    float64, of the inputs x of some of its linear layers."""
    tokens = hidden.shape[0] * hidden.shape[1]
    sums: dict[str, Tensor] = {}
    handles = []
    for name in names:
        linear = _linear(layer, name)
        shape = (linear.in_features, linear.in_features)
        sums[name] = torch.zeros(shape, dtype=torch.float64, device=walk.device)

        def hook(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            sums[name] += second_moments(given[0].flatten(0, 1))

        handles.append(linear.register_forward_pre_hook(hook))
    walk.run(layer, hidden, outputs)
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def _products_beyond(
    walk: DecoderWalk, layer: nn.Module, hidden: Tensor, outputs: Tensor, reached: Tensor
) -> Tensor:
    """E[x dᵀ], [in, hidden] in float64: x what enters `down_proj`, d = reached - outputs what the
    dropped layers wrote. The layer runs once more, for d is known only now."""
    linear = _linear(layer, _MLP)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    shape = (linear.in_features, hidden.shape[-1])
    total = torch.zeros(shape, dtype=torch.float64, device=walk.device)
    for start in range(0, len(hidden), walk.batch_windows):
        rows = slice(start, start + walk.batch_windows)
        walk.forward(layer, hidden[rows].to(walk.device))
        written = (reached[rows].float() - outputs[rows].float()).flatten(0, 1)
        total += seen.pop().float().t() @ written.to(walk.device)
    handle.remove()
    return total / (hidden.shape[0] * hidden.shape[1])


def _watch_mixture(layer: nn.Module, geometry: Geometry, seen: list[tuple[Tensor, Tensor]]) -> None:
    """Collect what enters and leaves the experts of a layer, each [tokens, hidden]."""
    assert geometry.mixture is not None
    layer.get_submodule(geometry.mixture.block).register_forward_hook(
        lambda _, given, made: seen.append((given[0].flatten(0, -2), made.flatten(0, -2)))
    )


def _solved_experts(
    layer: nn.Module, geometry: Geometry, cut: Cut, index: int, x: Tensor, y: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The last linear layers of the experts that stay, by their name in the source, [kept, kept] float64.

    x: [tokens, hidden] that the experts and their router read. y: what all of them wrote.
    """
    assert geometry.mixture is not None
    mixture = layer.get_submodule(geometry.mixture.block)
    assert isinstance(mixture, Experts)
    kept = cut.experts[index] if cut.experts else torch.arange(geometry.experts)
    logits = take(mixture.gate(x), 1, kept)
    shares, chosen = shares_of(logits, geometry.top_k, sums_to_one=geometry.shares_sum_to_one)
    names = _last_of_experts(cut, index, geometry)

    def seen(place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of an expert, their inputs of its last layer times their shares, and its weight."""
        token, choice = torch.where(chosen == place)
        expert = mixture.experts[int(kept[place])]
        assert isinstance(expert, Expert)
        _, columns = cut.linear_channels(index, names[place], geometry)
        inner = take(expert.inner(x[token]), 1, columns).float()
        weight = take(_linear(layer, names[place]).weight, 1, columns)
        return token, inner * shares[token, choice, None], weight.double()

    lacking = y.float()
    for place in range(len(kept)):
        token, inner, weight = seen(place)
        lacking = lacking.index_add(0, token, inner @ -weight.t().float())
    for place, name in enumerate(names):
        token, inner, weight = seen(place)
        beyond = inner.t().double() @ lacking[token].double()
        solved = _solve(second_moments(inner).double(), beyond, weight, None)
        lacking = lacking.index_add(0, token, inner @ (weight - solved).t().float())
        rows, _ = cut.linear_channels(index, name, geometry)
        yield name, take(solved, 0, rows)


def _solve(inputs: Tensor, beyond: Tensor | None, weight: Tensor, kept: Tensor | None) -> Tensor:
    """W' above: [out, kept] float64. weight: [out, in]. kept: indices of inputs."""
    weight = weight.double()
    wanted = inputs @ weight.t()
    if beyond is not None:
        wanted = wanted + beyond
    inputs, wanted = take(take(inputs, 0, kept), 1, kept), take(wanted, 0, kept)
    weight = take(weight, 1, kept)
    damping = _DAMPING * inputs.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(inputs + torch.diag(damping))
    return torch.cholesky_solve(wanted + damping.unsqueeze(1) * weight.t(), factor).t()
