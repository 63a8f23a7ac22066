"""What quantized layers have changed about the inputs of the next linear layers.

Start at `Drift.at`. A linear layer of the quantized model reads x̃ where the original's reads x. The weight
that comes nearest to the original's output Wx on what it really reads is W + W·E[(x - x̃)x̃ᵀ]·E[x̃x̃ᵀ]⁻¹ (QEP:
Arai & Ichikawa 2025, arXiv:2504.09629, equation 4). A linear layer that writes to the residual stream can
make up for the stream's own error r too: E[r x̃ᵀ] is added to the product. Rounding then starts from there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinier.calibration.fisher import LayerWeights
from tinier.calibration.statistics import KeysAndValues, damped
from tinier.calibration.walk import DecoderWalk
from tinier.errors import InputError
from tinier.families import Geometry, Input
from tinier.ranks import Ranks

STRENGTH = 0.5
"""How much of the change is made up for: all of it fits the calibration text (docs/log.md)"""
DAMP = 0.1
"""Added to the diagonal of the second moments, in means of it"""


class DriftSums(NamedTuple):
    """Means over tokens, weighted; float32."""

    moments: Tensor
    """[in, in] of x̃ x̃ᵀ"""
    cross: Tensor
    """[in, in] of (x - x̃) x̃ᵀ"""
    stream: Tensor | None
    """[hidden, in] of r x̃ᵀ, for linear layers that write to the residual stream"""

    def corrected(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that makes up for what changed, in part."""
        change = weight @ self.cross
        if self.stream is not None:
            change += self.stream
        for damp in (DAMP, 10 * DAMP, 100 * DAMP):  # the last is nearly a multiple of the identity
            lower, failed = torch.linalg.cholesky_ex(damped(self.moments, damp))
            if not failed:
                return weight + STRENGTH * torch.cholesky_solve(change.t(), lower).t()
        raise InputError(
            "the second moments of a layer's inputs are damaged, or the calibration text is too uniform: "
            "drift cannot be corrected. Use another text, or --drift ignored."
        )


class _Reached(Exception):
    """The inputs that were asked for are there; nothing behind them is computed."""


def reaches(geometry: Geometry, read: Input) -> bool:
    """Whether an input has the same tokens in both models: not where a router chose them."""
    return geometry.expert_of(read.readers[0]) is None


class Drift:
    """One layer's inputs in the original model beside those in the quantized one."""

    def __init__(
        self, walk: DecoderWalk, original: nn.Module, exact: Tensor, hidden: Tensor, geometry: Geometry,
        weights: LayerWeights | None, ranks: Ranks, cache: KeysAndValues | None = None,
    ) -> None:  # fmt: skip
        """original: the layer as it was. exact, hidden: what enters it in the original model, and in the
        quantized one; this rank's [n, length, hidden]. weights: of tokens, by input. cache: what rounds
        keys and values in the quantized one."""
        self._walk, self._original, self._cache = walk, original, cache
        self._exact, self._hidden = exact, hidden
        self._geometry, self._weights, self._ranks = geometry, weights, ranks

    @torch.no_grad()
    def at(
        self, read: Input, layer: nn.Module, factors: Tensor | None,
        rounding: Callable[[Tensor], Tensor] | None,
    ) -> DriftSums:  # fmt: skip
        """Sums over all ranks' tokens at one input.

        layer: what is quantized so far. factors: [in], by which it divides the input. rounding: of the
        input while the model runs.
        """
        walk, columns = self._walk, self._geometry.linears[read.readers[0]][1]

        def zeros(rows: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=torch.float64, device=walk.device)

        moments, cross, stream = zeros(columns), zeros(columns), None
        if self._stream_of(read) is not None:
            stream = zeros(self._geometry.hidden)
        counts = self._weights.inputs[read.name] if self._weights else None
        for start in range(0, len(self._hidden), walk.batch_windows):
            rows = slice(start, start + walk.batch_windows)
            x, before = self._inputs(self._original, self._exact[rows], read, None)
            seen, after = self._inputs(layer, self._hidden[rows], read, self._cache)
            x, seen = x.float() if factors is None else x.float() / factors, seen.float()
            seen = seen if rounding is None else rounding(seen)
            if counts is None:
                root = torch.ones(len(seen), 1, device=walk.device)
            else:
                root = counts[rows].to(walk.device).flatten().sqrt().unsqueeze(1)
            weighted = seen * root
            moments += _product(weighted, weighted)
            cross += _product((x - seen) * root, weighted)
            if stream is not None and before is not None and after is not None:
                lost = (before.float() - after.float()) / self._geometry.multipliers.residual
                stream += _product(lost * root, weighted)
        tokens = self._ranks.sum_(torch.tensor(self._hidden[..., 0].numel())).item()

        def mean(sums: Tensor) -> Tensor:
            return self._ranks.sum_(sums).div_(tokens).float()

        return DriftSums(mean(moments), mean(cross), None if stream is None else mean(stream))

    def _stream_of(self, read: Input) -> str | None:
        """The module that reads the stream which the readers of an input add to, "" for the layer itself;
        None where they add to none, or through a norm."""
        norms = self._geometry.norm_names
        attention, *mlps = self._geometry.blocks
        if read is attention[1] and norms.attention_out is None:
            return ""
        if any(read is mlp[1] for mlp in mlps) and norms.mlp_out is None:
            return norms.mlp_in
        return None

    def _inputs(
        self, layer: nn.Module, hidden: Tensor, read: Input, cache: KeysAndValues | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the readers of an input are given [tokens, in], and the stream [tokens, hidden] that they
        add to."""
        batch = hidden.to(self._walk.device, non_blocking=True)
        found: list[Tensor] = []
        name = self._stream_of(read)
        streams = [batch] if name == "" else []

        def reach(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Reached

        def pass_by(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            streams.append(inputs[0])

        handles = [layer.get_submodule(read.readers[0]).register_forward_pre_hook(reach)]
        if name:
            handles.append(layer.get_submodule(name).register_forward_pre_hook(pass_by))
        try:
            self._walk.forward(layer, batch, cache)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        stream = streams[0].flatten(0, -2) if streams else None
        return found[0].flatten(0, -2), stream


def _product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of [tokens, rows] and [tokens, columns], in float32."""
    if a.is_cuda:
        # rounded alike, a times itself stays positive; the tensor cores are some ten times as fast
        return torch.mm(a.to(torch.bfloat16).t(), b.to(torch.bfloat16), out_dtype=torch.float32)
    return a.t() @ b
