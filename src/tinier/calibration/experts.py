"""A mixture of experts as one module a linear layer, named as in the checkpoint.

transformers holds the experts of a layer as two tensors; here each is an MLP of its own, so that its
inputs can be seen, its weights replaced and its gradients kept apart like those of any other layer.
"""

from typing import Any

from torch import Tensor, nn

from tinier.families import Geometry, Mixture
from tinier.kernels import through_experts


def unfuse(layer: nn.Module, geometry: Geometry, config: Any) -> None:
    """Put `Experts` where a decoder layer of transformers has its MLP; nothing without a mixture."""
    if geometry.mixture is None:
        return
    from transformers.activations import ACT2FN  # takes a second, and torch's compiler along

    experts = Experts(geometry, geometry.mixture, ACT2FN[config.hidden_act])
    del layer._modules["mlp"]
    layer.add_module(geometry.mixture.block, experts.to(layer.input_layernorm.weight.dtype))  # type: ignore[union-attr, arg-type]
    if geometry.mixture.block != "mlp":  # what the layer calls, and no second name of its weights
        object.__setattr__(layer, "mlp", experts)


class Experts(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, geometry: Geometry, mixture: Mixture, activation: nn.Module) -> None:
        super().__init__()
        self._top_k, self._sums_to_one = geometry.top_k, geometry.shares_sum_to_one
        self._in_float32 = mixture.in_float32
        self.gate = nn.Linear(geometry.hidden, geometry.experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(geometry, mixture, activation) for _ in range(geometry.experts)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden]."""
        x = hidden.reshape(-1, hidden.shape[-1])
        out = through_experts(
            x, self.gate(x), self._top_k, lambda number, own: self.experts[number](own),
            sums_to_one=self._sums_to_one, in_float32=self._in_float32,
        )  # fmt: skip
        return out.view_as(hidden)


class Expert(nn.Module):
    def __init__(self, geometry: Geometry, mixture: Mixture, activation: nn.Module) -> None:
        super().__init__()
        self._names = mixture.gate, mixture.up, mixture.down
        sides = geometry.hidden, geometry.intermediate
        for name, (columns, rows) in zip(self._names, (sides, sides, sides[::-1]), strict=True):
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        self._activation = activation

    def inner(self, x: Tensor) -> Tensor:
        """What the last linear layer reads, [tokens, intermediate]. x: [tokens, hidden]."""
        gate, up = (self.get_submodule(name) for name in self._names[:2])
        found: Tensor = self._activation(gate(x)) * up(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.get_submodule(self._names[2])(self.inner(x))
        return made
