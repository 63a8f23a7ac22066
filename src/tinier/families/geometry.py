"""The sizes of one decoder, and the names and shapes of its tensors that follow from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from tinier.families.table import (
    NO_MULTIPLIERS,
    USUAL_NORMS,
    Channels,
    HeadNorms,
    Input,
    LayerKind,
    Mixture,
    Multipliers,
    Norms,
)
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR

EMBEDDING = f"{EMBEDDING_MODULE}.weight"
FINAL_NORM = "model.norm.weight"
HEAD = f"{HEAD_LINEAR}.weight"


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of one decoder, read from its configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    turning: int
    """Channels of a head that RoPE turns, the first ones"""
    vocab: int
    max_positions: int
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    hidden_in_heads: bool
    kinds: tuple[LayerKind, ...]
    """Of each layer."""
    head_norms: HeadNorms = "none"
    norm_names: Norms = USUAL_NORMS
    norm_offset: float = 0.0
    norms_in_float32: bool = False
    rope_in_float32: bool = False
    fused: bool = False
    mixture: Mixture | None = None
    experts: int = 0
    """How many; 0: one MLP"""
    top_k: int = 0
    """How many of them a token goes through"""
    shares_sum_to_one: bool = True
    """Whether the shares of a token's experts are divided by their sum"""
    multipliers: Multipliers = NO_MULTIPLIERS
    embedding_by_root: bool = False
    """Whether `multipliers.embedding` is the root of the hidden size."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    alike_positions: int | None = None
    """Sequences up to this long are all turned alike, longer ones in another way (longrope, dynamic); None:
    all are"""

    @property
    def cached_numbers(self) -> int:
        """Numbers that the cache holds for a token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer's attention."""
        return tuple(kind.window for kind in self.kinds)

    @cached_property
    def blocks(self) -> tuple[tuple[Input, Input], ...]:
        """What a layer consists of, in the order that it is computed: attention, and the MLP or every
        expert. Of each what its first linear layers read, and what the last one does, which writes to the
        stream."""
        norms, q, kv = self.norm_names, self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
        values, up = 0, 0
        if self.fused:
            qkv, gate_up = ("self_attn.qkv_proj",), ("mlp.gate_up_proj",)
            values, up = q + kv, self.intermediate
        attention = (
            Input("self_attn", qkv, norms.attention_in),
            Input("self_attn.o_proj", ("self_attn.o_proj",), qkv[-1], True, values),
        )
        if self.mixture is None:
            mlp = (
                Input("mlp", gate_up, norms.mlp_in),
                Input("mlp.down_proj", ("mlp.down_proj",), gate_up[-1], first_row=up),
            )
            return attention, mlp
        experts = []
        for name in (f"{self.mixture.block}.experts.{i}" for i in range(self.experts)):
            parts = (self.mixture.gate, self.mixture.up, self.mixture.down)
            first, second, third = (f"{name}.{part}" for part in parts)
            # a factor on the norm would be one for the router and all experts
            experts.append((Input(name, (first, second), None), Input(third, (third,), second)))
        return attention, *experts

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What a layer's linear layers read, in the order that it is computed."""
        return tuple(read for block in self.blocks for read in block)

    @property
    def router(self) -> str | None:
        """Name of the linear layer that chooses experts, inside a layer."""
        return None if self.mixture is None else f"{self.mixture.block}.gate"

    @cached_property
    def outputs(self) -> dict[str, tuple[tuple[Channels, int], ...]]:
        """What the rows of a layer's linear layers are, one after the other, and how many of each, by
        the name inside the layer."""
        q, kv, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        attention: list[tuple[Channels, int]] = [("q", q), ("k", kv), ("v", kv)]
        mlp: list[tuple[Channels, int]] = [("gate", inner), ("up", inner)]
        found: dict[str, tuple[tuple[Channels, int], ...]] = {}
        for number, (first, last) in enumerate(self.blocks):
            parts = mlp if number else attention
            if self.fused:
                found[first.readers[0]] = tuple(parts)
            else:
                found |= {name: (part,) for name, part in zip(first.readers, parts, strict=True)}
            found[last.readers[0]] = (("hidden", self.hidden),)
        return found

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of a layer's linear layers, by their name inside the layer; not the router."""
        columns: dict[str, int] = {}
        for number, (first, last) in enumerate(self.blocks):
            inner = self.intermediate if number else self.heads * self.head_dim
            columns |= dict.fromkeys(first.readers, self.hidden) | dict.fromkeys(
                last.readers, inner
            )
        rows = {name: sum(count for _, count in parts) for name, parts in self.outputs.items()}
        return {name: (rows[name], count) for name, count in columns.items()}

    @property
    def norms(self) -> dict[str, tuple[int]]:
        """Shapes of a layer's norm weights, by their name inside the layer."""
        norms = {f"{name}.weight": (self.hidden,) for name in self.norm_names if name}
        if self.head_norms != "none":
            q, k = (self.heads, self.kv_heads) if self.head_norms == "all" else (1, 1)
            norms["self_attn.q_norm.weight"] = (q * self.head_dim,)
            norms["self_attn.k_norm.weight"] = (k * self.head_dim,)
        return norms

    @property
    def biases(self) -> dict[str, tuple[int]]:
        """Shapes of a layer's biases, by their name inside the layer."""
        biased: list[str] = []
        (attention, out), *mlps = self.blocks
        if self.qkv_bias:
            biased += attention.readers
        if self.out_bias:
            biased += out.readers
        if self.mlp_bias:
            biased += (name for block in mlps for read in block for name in read.readers)
        return {f"{name}.bias": (self.linears[name][0],) for name in biased}

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        linear = sum(rows * columns for rows, columns in self.linears.values())
        linear += self.experts * self.hidden
        return linear + sum(n for (n,) in (self.norms | self.biases).values())

    @property
    def active_layer_parameters(self) -> int:
        """Those that one token is multiplied with: of a mixture its own experts."""
        idle = (self.experts - self.top_k) * 3 * self.hidden * self.intermediate
        return self.layer_parameters - idle

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return self.layers * self.layer_parameters + self._edge_parameters

    @property
    def active_parameters(self) -> int:
        """Those of the layers that one token is multiplied with, and of embedding, norm and head."""
        return self.layers * self.active_layer_parameters + self._edge_parameters

    @property
    def _edge_parameters(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied_head else 2) + self.hidden

    def expert_of(self, linear: str) -> int | None:
        """Which expert a linear layer belongs to. linear: its name inside a layer, or a tensor's."""
        if self.mixture is None or not linear.startswith(f"{self.mixture.block}.experts."):
            return None
        return int(linear.removeprefix(f"{self.mixture.block}.experts.").partition(".")[0])


def norm_weight(stored: Tensor, geometry: Geometry) -> Tensor:
    """What a norm multiplies with: the stored weight with the family's offset, in float32 where the norm
    rounds after that (kernels.rms_norm)."""
    return stored.float() + geometry.norm_offset if geometry.norms_in_float32 else stored


def layer_name(index: int) -> str:
    """Prefix of a decoder layer's tensors."""
    return f"model.layers.{index}"


def linear_names(geometry: Geometry) -> list[str]:
    """Every linear layer that may be quantized, by its full name, the head last."""
    layers = [f"{layer_name(i)}.{n}" for i in range(geometry.layers) for n in geometry.linears]
    return [*layers, HEAD_LINEAR]


def linear_shape(geometry: Geometry, name: str) -> tuple[int, int]:
    """[out, in] of a linear layer, or the embedding, by its full name."""
    if name in (HEAD_LINEAR, EMBEDDING_MODULE):
        return geometry.vocab, geometry.hidden
    return geometry.linears[name.split(".", 3)[3]]


def module_names(geometry: Geometry) -> list[str]:
    """Those, and the routers: all that other loaders take for a linear layer. The embedding is none."""
    routers = [f"{layer_name(i)}.{geometry.router}" for i in range(geometry.layers)]
    return [*(routers if geometry.router else []), *linear_names(geometry)]
