"""What quantization needs to know about the inputs of a layer's linear layers.

Start at `observe`. One forward pass over the calibration windows; sums, not activations, are kept.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinier.calibration.fisher import LayerWeights
from tinier.calibration.walk import DecoderWalk
from tinier.errors import InputError
from tinier.families import Geometry
from tinier.numerics import round_static
from tinier.ranks import Ranks

_SAMPLE_TOKENS = 256


@dataclass(slots=True)
class InputStatistics:
    """Of one input that some linear layers share; `in` channels."""

    mean_square: Tensor
    """[in] float32"""
    mean_abs: Tensor
    """[in] float32"""
    absmax: Tensor
    """[in] float32"""
    moments: Tensor | None
    """[in, in] float32, mean of x xᵀ; None unless asked for"""
    sample: Tensor
    """[tokens, in], evenly spaced tokens of all windows; of an expert the first that reached it"""
    tokens: int
    """How many were seen; none: the numbers above are zero"""

    def divided_by(self, factors: Tensor) -> "InputStatistics":
        """The statistics of x / factors. factors: [in]."""
        moments = None
        if self.moments is not None:
            moments = self.moments / factors.unsqueeze(1) / factors
        return InputStatistics(
            self.mean_square / factors.square(),
            self.mean_abs / factors,
            self.absmax / factors,
            moments,
            self.sample / factors,
            self.tokens,
        )


class KeysAndValues:
    """Stands where attention expects a cache: sees keys and values, may round them, keeps none."""

    def __init__(self, rounding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None) -> None:
        self._rounding = rounding
        self.absmax = torch.zeros(2)
        """Largest |key| and |value| seen."""

    @classmethod
    def static(cls, kind: str, key_scale: Tensor, value_scale: Tensor) -> "KeysAndValues":
        """One that rounds to INT8 or E4M3 (`kind` int or float) with given scales."""

        def rounding(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return (
                round_static(keys, kind, key_scale).to(keys.dtype),
                round_static(values, kind, value_scale).to(values.dtype),
            )

        return cls(rounding)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """transformers' interface of a cache. keys, values: [batch, kv_heads, length, head_dim]."""
        if self._rounding:
            return self._rounding(keys, values)
        seen = torch.stack((keys.abs().amax(), values.abs().amax())).float().cpu()
        self.absmax = torch.maximum(self.absmax, seen)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


@dataclass(slots=True)
class _Sums:
    """Running sums in float64, so that their order does not show."""

    square: Tensor
    abs: Tensor
    absmax: Tensor
    moments: Tensor | None
    samples: list[Tensor] = field(default_factory=list)
    tokens: int = 0


@torch.no_grad()
def observe(
    walk: DecoderWalk,
    layer: nn.Module,
    geometry: Geometry,
    hidden: Tensor,
    total_windows: int,
    ranks: Ranks,
    *,
    moments: Collection[str],
    cache: KeysAndValues | None = None,
    weights: LayerWeights | None = None,
) -> tuple[dict[str, InputStatistics], Tensor]:
    """Statistics of the layer's inputs by name (Geometry.inputs), and the layer's outputs for the first
    batch.

    hidden: this rank's windows [n, length, hidden]. total_windows: of all ranks. Sums go over all
    ranks. moments: names of the inputs whose second moments are wanted. weights: of each token in mean
    squares and moments, by input (fisher.py); else all count alike.
    """
    sums: dict[str, _Sums] = {}
    per_window = max(1, _SAMPLE_TOKENS // total_windows)
    stride = max(1, hidden.shape[1] // per_window)
    handles = []
    for read in geometry.inputs:
        columns = geometry.linears[read.readers[0]][1]
        sums[read.name] = _empty(columns, walk.device, read.name in moments)
        weighted = weights.inputs.get(read.name) if weights else None
        counted = iter(weighted.split(walk.batch_windows)) if weighted is not None else None

        def hook(
            _: nn.Module, inputs: tuple[Tensor, ...], own: _Sums = sums[read.name],
            counted: Iterator[Tensor] | None = counted,
        ) -> None:  # fmt: skip
            x = inputs[0]
            if x.ndim == 3:
                sample = x[:, ::stride][:, :per_window].flatten(0, 1)
            else:  # an expert's: those of its tokens that come first
                sample = x[: max(0, _SAMPLE_TOKENS - sum(map(len, own.samples)))]
            _add(own, x.flatten(0, -2), sample, None if counted is None else next(counted))

        handles.append(layer.get_submodule(read.readers[0]).register_forward_pre_hook(hook))
    first = None
    for batch in hidden.split(walk.batch_windows):
        output = walk.forward(layer, batch.to(walk.device, non_blocking=True), cache)
        first = output if first is None else first
    for handle in handles:
        handle.remove()
    assert first is not None
    if cache is not None:
        ranks.max_(cache.absmax)
    for read in geometry.inputs:
        own = sums[read.name]
        if not torch.isfinite(ranks.max_(own.absmax.clone())).all():
            readers = ", ".join(read.readers)
            raise InputError(
                f"inputs of {readers} in layer {layer.self_attn.layer_idx} are no numbers (NaN or Inf): "  # type: ignore[union-attr]
                "the model overflows its type there. A float16 model may need dtype bfloat16 in its "
                "config.json."
            )
    return {name: _finish(own, ranks) for name, own in sums.items()}, first


def _empty(channels: int, device: torch.device, moments: bool) -> _Sums:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    products = zeros(channels, channels) if moments else None
    return _Sums(zeros(channels), zeros(channels), zeros(channels), products)


def _add(sums: _Sums, x: Tensor, sample: Tensor, weights: Tensor | None) -> None:
    """x: [tokens, in]. weights: [windows, length] of these tokens."""
    size = x.abs().float()
    weighted = size
    if weights is not None:
        x = weighted = x.float() * weights.to(x.device).flatten().sqrt().unsqueeze(1)
    sums.square += weighted.square().sum(dim=0)
    sums.abs += size.sum(dim=0)
    sums.absmax = torch.maximum(sums.absmax, size.amax(dim=0).double())
    if sums.moments is not None:
        sums.moments += second_moments(x)
    sums.samples.append(sample.float())
    sums.tokens += len(x)


def second_moments(x: Tensor) -> Tensor:
    """xᵀ x in float32. x: [tokens, in]."""
    if x.is_cuda and x.dtype != torch.float32:
        # products of 16-bit numbers are exact in float32, so the tensor cores lose nothing here
        return torch.mm(x.t(), x, out_dtype=torch.float32)
    x = x.float()
    return x.t() @ x


def damped(moments: Tensor, share: float) -> Tensor:
    """Second moments [in, in] with a share of their mean diagonal added to it."""
    raised = moments.clone()
    raised.diagonal().add_(share * moments.diagonal().mean())
    return raised


def _finish(sums: _Sums, ranks: Ranks) -> InputStatistics:
    seen = int(ranks.sum_(torch.tensor(sums.tokens)))
    tokens = max(1, seen)
    moments = None
    if sums.moments is not None:
        moments = ranks.sum_(sums.moments).div_(tokens).float()
    return InputStatistics(
        (ranks.sum_(sums.square) / tokens).float(),
        (ranks.sum_(sums.abs) / tokens).float(),
        ranks.max_(sums.absmax).float(),
        moments,
        ranks.gather(
            torch.cat([sums.square.new_zeros(0, len(sums.square)).float(), *sums.samples])
        ),
        seen,
    )
