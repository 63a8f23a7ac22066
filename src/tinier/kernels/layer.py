"""The weights of one decoder layer, as every way to run it takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tinier.families import Geometry
from tinier.kernels.experts import Experts
from tinier.kernels.linear import Linear


@dataclass(slots=True, kw_only=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: Tensor | None
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    post_norm: Tensor | None
    gate_up: Linear | None
    down: Linear | None
    experts: Experts | None = None
    """Instead of those two"""
    norms_all_heads: bool = False
    """Whether q_norm and k_norm, [H·D] and [K·D], are over all heads together"""
    attention_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    kv_scales: tuple[Tensor, Tensor] | None = None
    """Of keys and of values, each [1], where the cache is quantized."""

    @property
    def head_norms(self) -> tuple[Tensor, Tensor] | None:
        """Norms [D] of each head of q and of k, where the model has them."""
        if self.q_norm is None or self.k_norm is None or self.norms_all_heads:
            return None
        return self.q_norm, self.k_norm

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All but the router."""
        mlp = [self.gate_up, self.down]
        if self.experts is not None:
            mlp = [*self.experts.gate_up, *self.experts.down]
        return (self.qkv, self.out, *(linear for linear in mlp if linear is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWeights:
    """What a step in one native call needs of a decoder (cpu_decode.py, gpu_decode.py)."""

    geometry: Geometry
    layers: Sequence[Layer]
    final_norm: Tensor
    head: Linear

    @property
    def linears(self) -> list[Linear]:
        """All but the routers, the head last."""
        return [*(linear for layer in self.layers for linear in layer.linears), self.head]
