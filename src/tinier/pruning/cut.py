"""What is left of a model: which layers, channels, neurons and heads; and how tensors are cut to it.

Start at `Cut`. The same sizes in every layer, so that the result is a plain model of its architecture;
which neurons and heads they are is each layer's own. Minitron, arXiv 2407.14679.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinier.families import EMBEDDING, FINAL_NORM, HEAD, Geometry

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# entries of config.json that have one element per layer
_PER_LAYER_KEYS = ("layer_types", "no_rope_layers")
# how many experts: files have either, and transformers takes one for the other
_COUNT_KEYS = ("num_experts", "num_local_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a decoder that pruning can change."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    experts: int = 0
    """0: no mixture of experts"""

    @classmethod
    def of(cls, geometry: Geometry) -> "Sizes":
        return cls(
            layers=geometry.layers,
            hidden=geometry.hidden,
            intermediate=geometry.intermediate,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            experts=geometry.experts,
        )

    @property
    def label(self) -> str:
        """Such as `23 layers, hidden 576, intermediate 1536, 9 heads, 3 KV heads`."""
        return (
            f"{self.layers} layers, hidden {self.hidden}, intermediate {self.intermediate}, "
            f"{self.heads} heads, {self.kv_heads} KV heads"
            + (f", {self.experts} experts" if self.experts else "")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What is kept. Indices are in order; None keeps all."""

    layers: tuple[int, ...]
    hidden: Tensor | None = None
    """[kept] channels of the residual stream"""
    neurons: dict[int, Tensor] | None = None
    """[kept] of the MLP, by layer of the source; of a mixture [experts of the source, kept]"""
    heads: dict[int, Tensor] | None = None
    """[kept] query heads, by layer"""
    kv_heads: dict[int, Tensor] | None = None
    experts: dict[int, Tensor] | None = None
    """[kept] experts, by layer"""

    def sizes(self, geometry: Geometry) -> Sizes:
        """The sizes of what is left."""
        first = self.layers[0]
        return Sizes(
            layers=len(self.layers),
            hidden=geometry.hidden if self.hidden is None else len(self.hidden),
            intermediate=self.neurons[first].shape[-1] if self.neurons else geometry.intermediate,
            heads=geometry.heads if not self.heads else len(self.heads[first]),
            kv_heads=geometry.kv_heads if not self.kv_heads else len(self.kv_heads[first]),
            experts=geometry.experts if not self.experts else len(self.experts[first]),
        )

    def renamed(self, name: str, geometry: Geometry) -> str | None:
        """What a tensor of the source is called in the result; None for those of a layer, or an expert,
        that is dropped."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return name
        layer = int(match[1])
        if layer not in self.layers:
            return None
        inside = self.renamed_inside(layer, match[2], geometry)
        return None if inside is None else f"model.layers.{self.layers.index(layer)}.{inside}"

    def renamed_inside(self, layer: int, name: str, geometry: Geometry) -> str | None:
        """What a tensor of a kept layer is called inside it in the result; None: its expert is dropped."""
        expert = geometry.expert_of(name)
        if expert is None or self.experts is None:
            return name
        kept = self.experts[layer].tolist()
        if expert not in kept:
            return None
        return name.replace(f".experts.{expert}.", f".experts.{kept.index(expert)}.")

    def tensor(self, name: str, tensor: Tensor, geometry: Geometry) -> Tensor:
        """A tensor of the source, cut. name: its full name there."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self._edge(name, tensor, geometry)
        return self.layer_tensor(int(match[1]), match[2], tensor, geometry)

    def layer_tensor(self, layer: int, name: str, tensor: Tensor, geometry: Geometry) -> Tensor:
        """A tensor of a decoder layer, cut. name: inside the layer."""
        if name.removesuffix(".weight") in geometry.norm_names:
            return _of_fewer(tensor, self.hidden, geometry.norm_offset)
        linear, _, part = name.rpartition(".")
        if linear in ("self_attn.q_norm", "self_attn.k_norm"):
            if geometry.head_norms == "each":  # one entry per channel of a head
                return tensor
            heads = self.heads if linear == "self_attn.q_norm" else self.kv_heads
            rows = _expand(heads[layer], geometry.head_dim) if heads else None
            return _of_fewer(tensor, rows, geometry.norm_offset)
        if linear == geometry.router:
            kept = self.experts[layer] if self.experts else None
            return take(take(tensor, 0, kept), 1, self.hidden)
        rows, columns = self.linear_channels(layer, linear, geometry)
        tensor = take(tensor, 0, rows)
        return tensor if part == "bias" else take(tensor, 1, columns)

    def linear_channels(
        self, layer: int, linear: str, geometry: Geometry
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which outputs and which inputs of a linear layer are kept; None: all. linear: its name
        inside the layer."""
        q = _expand(self.heads[layer], geometry.head_dim) if self.heads else None
        kv = _expand(self.kv_heads[layer], geometry.head_dim) if self.kv_heads else None
        neurons = self.neurons[layer] if self.neurons else None
        if neurons is not None and neurons.dim() == 2:
            expert = geometry.expert_of(linear)
            neurons = None if expert is None else neurons[expert]
        kept: dict[str, Tensor | None] = {
            "q": q, "k": kv, "v": kv, "gate": neurons, "up": neurons, "hidden": self.hidden,
        }  # fmt: skip
        parts = geometry.outputs[linear]
        columns = self.hidden
        if parts[0][0] == "hidden":  # what writes to the stream
            columns = q if linear == "self_attn.o_proj" else neurons
        return _one_after_another([(kept[part], count) for part, count in parts]), columns

    def config(self, config: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
        """config.json of the result."""
        sizes, before = self.sizes(geometry), Sizes.of(geometry)
        pruned = config | {"num_hidden_layers": sizes.layers}
        for key in _PER_LAYER_KEYS:
            if config.get(key):
                pruned[key] = [config[key][layer] for layer in self.layers]
        if config.get("max_window_layers") is not None:  # Qwen: full attention up to this layer
            boundary = config["max_window_layers"]
            below = sum(layer < boundary for layer in range(before.layers))
            kept = sum(layer < boundary for layer in self.layers)
            pruned["max_window_layers"] = boundary - below + kept
        if sizes.intermediate != before.intermediate:
            key = geometry.mixture.width_key if geometry.mixture else "intermediate_size"
            pruned[key] = sizes.intermediate
        if geometry.mixture is not None and sizes.experts != before.experts:
            named = [key for key in _COUNT_KEYS if key in config] or [geometry.mixture.count_key]
            pruned |= dict.fromkeys(named, sizes.experts)
        if (sizes.heads, sizes.kv_heads) != (before.heads, before.kv_heads):
            pruned |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
        if sizes.hidden != before.hidden:
            pruned["hidden_size"] = sizes.hidden
            pruned["rms_norm_eps"] = geometry.norm_eps * before.hidden / sizes.hidden
        if (sizes.hidden, sizes.heads) != (before.hidden, before.heads):
            pruned["head_dim"] = geometry.head_dim  # no longer hidden / heads
        return pruned

    def _edge(self, name: str, tensor: Tensor, geometry: Geometry) -> Tensor:
        # an embedding that is multiplied by the root of the hidden size makes up for the smaller one; a
        # head that is the same matrix then does what the final norm would have to
        rooted = geometry.embedding_by_root and self.hidden is not None
        if name == EMBEDDING and rooted:
            assert self.hidden is not None
            factor = (tensor.shape[1] / len(self.hidden)) ** 0.5
            grown: Tensor = take(tensor, 1, self.hidden).float() * factor
            return grown.to(tensor.dtype)
        if name in (EMBEDDING, HEAD):
            return take(tensor, 1, self.hidden)
        if name == FINAL_NORM and rooted and geometry.tied_head:
            return take(tensor, 0, self.hidden)
        if name != FINAL_NORM:
            return tensor
        return _of_fewer(tensor, self.hidden, geometry.norm_offset)


def _of_fewer(weight: Tensor, kept: Tensor | None, offset: float) -> Tensor:
    """The weight of a norm over fewer channels, which divides by the root of another mean: as if those that
    are gone had been zero, it is larger by the root of the ratio of their numbers, and the weight makes up
    for it (the norm's epsilon in `config` likewise, for the hidden states)."""
    if kept is None:
        return weight
    factor = (len(weight) / len(kept)) ** 0.5
    scaled: Tensor = (take(weight, 0, kept).float() + offset) * factor - offset
    return scaled.to(weight.dtype)


def _one_after_another(parts: list[tuple[Tensor | None, int]]) -> Tensor | None:
    """Indices of what is kept of several parts, each with its number of rows; None: all."""
    if all(kept is None for kept, _ in parts):
        return None
    found, begun = [], 0
    for kept, count in parts:
        found.append(begun + (torch.arange(count) if kept is None else kept))
        begun += count
    return torch.cat(found)


def _expand(heads: Tensor, head_dim: int) -> Tensor:
    """Channels [kept · head_dim] of some heads."""
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def take(tensor: Tensor, dim: int, index: Tensor | None) -> Tensor:
    """The entries of `index` along `dim`; None: all."""
    return tensor if index is None else tensor.index_select(dim, index.to(tensor.device))
