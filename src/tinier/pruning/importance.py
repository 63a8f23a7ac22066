"""How much each part of a model matters, from one forward pass over calibration text.

Start at `measure_importance`. Of layers: block influence (ShortGPT, arXiv 2403.03853, equation 1:
1 - mean over tokens of cos(input, output)) and the angular distance over n layers (arXiv 2403.17887,
equation 7). Of parts: Minitron's activations (arXiv 2407.14679, section 2.2): mean of |activation| over
a window, then the L2 norm over windows. Scores are kept in tinier's cache folder, by the content of
model and text, so that another target costs no second pass.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinier.calibration import DecoderWalk
from tinier.checkpoint import Checkpoint, cache_folder, code_digest, new_file
from tinier.families import FINAL_NORM, Geometry, geometry_of, norm_weight
from tinier.kernels import rms_norm
from tinier.kernels.reference import shares_of
from tinier.progress import bar, say
from tinier.pruning.cut import Cut, Sizes
from tinier.text import tensor_sha256


@dataclass(frozen=True, slots=True)
class Importance:
    """Larger is more important."""

    influence: Tensor
    """[layers] block influence"""
    angular: Tensor
    """[layers + 1, layers + 1]: entry (i, j) is the angular distance, in half turns, of the hidden
    states before layer i and before layer j > i; the rest is zero"""
    neurons: Tensor
    """[layers, intermediate]; of a mixture [layers, experts, intermediate]"""
    heads: Tensor
    """[layers, heads]"""
    hidden: Tensor
    """[hidden], summed over all norms"""
    experts: Tensor
    """[layers, experts]: the sum over a text's tokens of the size of what an expert adds"""

    def kept_neurons(self, count: int) -> dict[int, Tensor]:
        """The most important neurons of each layer."""
        return {layer: _top(scores, count) for layer, scores in enumerate(self.neurons)}

    def kept_heads(
        self, geometry: Geometry, heads: int, kv_heads: int
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The most important KV groups of each layer, and in each of them the most important query
        heads: as many in one group as in another, as grouped attention wants it."""
        per_group = geometry.heads // geometry.kv_heads
        queries, groups = {}, {}
        for layer, scores in enumerate(self.heads):
            grouped = scores.view(geometry.kv_heads, per_group)
            groups[layer] = _top(grouped.square().sum(dim=1), kv_heads)
            kept = [
                group * per_group + _top(grouped[group], heads // kv_heads)
                for group in groups[layer].tolist()
            ]
            queries[layer] = torch.cat(kept)
        return queries, groups

    def kept_hidden(self, count: int) -> Tensor:
        """The most important channels of the residual stream."""
        return _top(self.hidden, count)

    def kept_experts(self, count: int) -> dict[int, Tensor]:
        """The experts of each layer that carry most of its output."""
        return {layer: _top(scores, count) for layer, scores in enumerate(self.experts)}

    def least_influential(self, count: int) -> tuple[int, ...]:
        """The `count` layers of lowest influence, in order; the first two and the last come last.

        Those three read the embedding and write for the head: their removal breaks a model whatever
        their score (arXiv 2403.17887, 2408.11796).
        """
        return least_influential(self.influence.tolist(), count)

    def nearest_block(self, count: int) -> tuple[int, ...]:
        """The `count` layers in a row between whose ends the states turn least; the last layer and
        the first two are left where there are others."""
        total = len(self.influence)
        starts = range(total - count + 1)
        allowed = [s for s in starts if s >= 2 and s + count < total] or list(starts)
        start = min(allowed, key=lambda s: self.angular[s, s + count].item())
        return tuple(range(start, start + count))


def cut_to(
    geometry: Geometry, sizes: Sizes, layers: tuple[int, ...], importance: Importance | None
) -> Cut:
    """The cut of these sizes that keeps these layers and the most important of everything else; the
    first ones where no importance was measured."""
    if importance is None:
        most = max(geometry.intermediate, geometry.hidden, geometry.heads, geometry.experts)
        ones, total = torch.arange(most, 0, -1.0), geometry.layers
        importance = Importance(
            ones, ones, ones[: geometry.intermediate].expand(_neurons(geometry)),
            ones[: geometry.heads].expand(total, -1), ones[: geometry.hidden],
            ones[: geometry.experts].expand(total, -1),
        )  # fmt: skip
    cut = Cut(layers=layers)
    if sizes.hidden != geometry.hidden:
        cut = replace(cut, hidden=importance.kept_hidden(sizes.hidden))
    if sizes.intermediate != geometry.intermediate:
        cut = replace(cut, neurons=importance.kept_neurons(sizes.intermediate))
    if (sizes.heads, sizes.kv_heads) != (geometry.heads, geometry.kv_heads):
        heads, kv_heads = importance.kept_heads(geometry, sizes.heads, sizes.kv_heads)
        cut = replace(cut, heads=heads, kv_heads=kv_heads)
    if sizes.experts != geometry.experts:
        cut = replace(cut, experts=importance.kept_experts(sizes.experts))
    return cut


def least_influential(scores: list[float], count: int) -> tuple[int, ...]:
    """The indices of the `count` lowest scores, in order; those of the first two and the last layer
    only when nothing else is left."""
    protected = {0, 1, len(scores) - 1}
    ranked = sorted(range(len(scores)), key=lambda layer: (layer in protected, scores[layer]))
    return tuple(sorted(ranked[:count]))


def measure_importance(
    checkpoint: Checkpoint, windows: Tensor, *, device: torch.device
) -> Importance:
    """Scores of all parts, measured or read where they were measured before. windows: [n, length]."""
    key = f"{checkpoint.hash} {tensor_sha256(windows)} {code_digest(__name__)}"
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    path = cache_folder() / "importance" / name
    if path.exists():
        say(f"importance: read from {path}")
        with safe_open(path, framework="pt") as stream:
            return Importance(**{n: stream.get_tensor(n) for n in stream.keys()})  # noqa: SIM118
    found = _measure(checkpoint, windows, device)
    _keep(path, found)
    return found


@torch.no_grad()
def _measure(checkpoint: Checkpoint, windows: Tensor, device: torch.device) -> Importance:
    geometry = geometry_of(checkpoint)
    total = geometry.layers
    walk = DecoderWalk(checkpoint, windows.shape[1], device)
    hidden = walk.embed(windows)
    influence = torch.zeros(total)
    angular = torch.zeros(total + 1, total + 1)
    neurons = torch.zeros(_neurons(geometry))
    experts = torch.zeros(total, geometry.experts)
    heads = torch.zeros(total, geometry.heads)
    channels = torch.zeros(geometry.hidden)
    ends = [hidden[:, -1].float()]  # of each window's last token, before each layer
    with bar("importance", total) as advance:
        for index in range(total):
            layer = walk.load(index)
            seen = _Seen(layer, geometry, windows.shape[1])
            outputs = walk.run(layer, hidden, torch.empty_like(hidden))
            neurons[index], heads[index] = seen.neurons(), seen.heads()
            channels += seen.norms()
            experts[index] = seen.experts()
            cosines = F.cosine_similarity(hidden.float(), outputs.float(), dim=-1)
            influence[index] = 1 - cosines.mean()
            hidden = outputs
            ends.append(hidden[:, -1].float())
            for before in range(index + 1):
                cosine = F.cosine_similarity(ends[before], ends[index + 1], dim=-1)
                turn = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
                angular[before, index + 1] = turn.mean()
            advance(1)
    with checkpoint.reader() as read:
        normed = rms_norm(hidden, norm_weight(read(FINAL_NORM), geometry), geometry.norm_eps)
    channels += normed.float().abs().mean(dim=1).square().sum(dim=0).sqrt()
    return Importance(influence, angular, neurons, heads, channels, experts)


def _neurons(geometry: Geometry) -> tuple[int, ...]:
    """How many there are, by layer and expert."""
    inner = (
        (geometry.experts, geometry.intermediate) if geometry.experts else (geometry.intermediate,)
    )
    return geometry.layers, *inner


class _Seen:
    """What flows through one layer, window by window."""

    def __init__(self, layer: nn.Module, geometry: Geometry, length: int) -> None:
        """length: tokens of a window."""
        self._length = length
        self._sums: dict[str, Tensor] = {}
        self._head_dim = geometry.head_dim
        # what enters attention and the MLP: after the norm before them, where there is one
        (attention, _), (mlp, _), *_ = geometry.blocks
        self._entrances = (attention.readers[0], geometry.router or mlp.readers[0])
        self._experts = _SeenExperts(layer, geometry) if geometry.mixture else None
        inner = ["self_attn.o_proj"] if self._experts else ["self_attn.o_proj", "mlp.down_proj"]
        for name in (*inner, *self._entrances):
            layer.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: self._add(name, given[0])

    def _add(self, name: str, x: Tensor) -> None:
        """x: [windows, length, channels], or before a router [windows · length, channels]."""
        x = x.view(-1, self._length, x.shape[-1])
        squares = x.float().abs().mean(dim=1).square().sum(dim=0).cpu()
        self._sums[name] = self._sums.get(name, torch.zeros_like(squares)) + squares

    def neurons(self) -> Tensor:
        if self._experts is not None:
            return self._experts.neurons.sqrt()
        return self._sums["mlp.down_proj"].sqrt()

    def experts(self) -> Tensor:
        return torch.zeros(0) if self._experts is None else self._experts.carried

    def heads(self) -> Tensor:
        return self._sums["self_attn.o_proj"].view(-1, self._head_dim).sum(dim=1).sqrt()

    def norms(self) -> Tensor:
        return torch.stack([self._sums[name].sqrt() for name in self._entrances]).sum(dim=0)


class _SeenExperts:
    """What flows through the experts of one layer, token by token: each expert sees its own."""

    def __init__(self, layer: nn.Module, geometry: Geometry) -> None:
        self.carried = torch.zeros(geometry.experts)
        """Σ share · |output| over the tokens of each (REAP, arXiv 2510.13999, takes their mean: here an
        expert that is asked often counts more)"""
        self.neurons = torch.zeros(geometry.experts, geometry.intermediate)
        """Σ (share · activation)² over the tokens of each"""
        self._top_k, self._sums_to_one = geometry.top_k, geometry.shares_sum_to_one
        assert geometry.router is not None
        layer.get_submodule(geometry.router).register_forward_hook(self._route)
        for number, (_, last) in enumerate(geometry.blocks[1:]):
            layer.get_submodule(last.name).register_forward_hook(self._hook(number))

    def _route(self, _: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        self._shares, self._chosen = shares_of(logits, self._top_k, sums_to_one=self._sums_to_one)

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, given, made: self._add(number, given[0], made)

    def _add(self, number: int, act: Tensor, made: Tensor) -> None:
        # in the tokens' order, as `made` is
        share = self._shares[self._chosen == number].unsqueeze(1)
        self.carried[number] += (share * made.float()).norm(dim=1).sum().cpu()
        self.neurons[number] += (share * act.float()).square().sum(dim=0).cpu()


def _keep(path: Path, found: Importance) -> None:
    tensors = {name: getattr(found, name).contiguous() for name in Importance.__slots__}
    with new_file(path) as partial:
        save_file(tensors, partial)


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, in order."""
    return scores.topk(count).indices.sort().values
