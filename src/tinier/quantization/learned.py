"""Learned rounding: choose codes and scales so that the decoder layer's output is right.

Start at `learn_rounding`. In: a layer quantized already (by GPTQ), inputs as the quantized model makes
them, and the outputs of the original layer in the original model. Every code may move from the weight
it stands for by learned offset V, every scale by a learned factor; gradients pass the rounding as if
it were not there. Minimizes the mean square error of the layer's output, weighted by the Fisher information
at each channel and token where that is known (calibration/fisher.py); else as the norm behind it hands it
on: each token divided by its root mean square, each channel times that norm's weight. A few tokens (the
first one above all) and a few channels (in Gemma 3 above all) are hundreds of times larger than the rest,
and would be all that is learned (docs/log.md).

The problem is that of AdaRound (Nagel et al., arXiv 2004.10568) and the parameters those of AutoRound
(Cheng et al., arXiv 2309.05516). Adam in place of sign descent, and starting from GPTQ's codes in place
of the nearest, gave less divergence after the same number of steps (docs/log.md).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinier.calibration import DecoderWalk
from tinier.numerics import Quantized, dequantize, expand, in_blocks, int_range, step_size
from tinier.quantization.layer import QuantizedLayer

_BATCH_WINDOWS = 8
_OFFSET_LR = 0.01
_SCALE_LR = 0.001
# a code that is far from its weight (GPTQ moved it there) starts this close to the rounding boundary
_EDGE = 0.49


class Importance(NamedTuple):
    """What errors of a layer's outputs count."""

    channels: Tensor
    """[hidden], for the square of each; of the weight of the norm that follows, or from the Fisher
    information"""
    tokens: Tensor | None
    """[windows, length], from the Fisher information; None: one over each token's mean square"""


@dataclass(slots=True)
class _Soft:
    """A quantized weight with codes and scales that gradients can move."""

    start: Quantized
    bits: int
    position: Tensor
    """[out, in] where each code stands before rounding: within half a step of the start's code"""
    offset: Tensor
    """[out, in], learned, in steps"""
    stretch: Tensor
    """[R, C], learned: each scale is multiplied by one plus it"""

    def codes(self) -> Tensor:
        moved = self.position + self.offset
        rounded = moved.detach().round().clamp_(*int_range(self.bits))
        return moved + (rounded - moved.detach())

    def weight(self) -> Tensor:
        """[out, in] float32."""
        blocks = in_blocks(self.codes(), self.start.scale.shape)
        if self.start.zero_point is not None:
            blocks = blocks - self.start.zero_point.float()[:, None, :, None]
        step = step_size(self.start) * (1 + self.stretch)
        return (blocks * step[:, None, :, None]).reshape(self.position.shape)

    def harden(self) -> Quantized:
        codes = self.codes().detach().to(torch.int8)
        scale = self.start.scale.float() * (1 + self.stretch.detach())
        return self.start._replace(codes=codes, scale=scale.to(self.start.scale.dtype))


def learn_rounding(
    walk: DecoderWalk,
    layer: nn.Module,
    quantized: QuantizedLayer,
    names: list[str],
    inputs: Tensor,
    outputs: Tensor,
    importance: Importance,
    *,
    iterations: int,
    seed: int,
) -> tuple[float, float]:
    """Improve `quantized` in place; returns the error of its first batch, before and after.

    layer: the module with its original weights. names: the linear layers to learn; the others' codes stay.
    inputs, outputs: [windows, length, hidden], on the host. Integer weights with 16-bit activations only.
    """
    soft = {name: _soften(quantized, name) for name in names}
    fixed = {
        name: dequantize(linear.weight, inputs.dtype)
        for name, linear in quantized.linears.items()
        if name not in soft
    }
    offsets = [s.offset for s in soft.values()]
    stretches = [s.stretch for s in soft.values()]
    optimizer = torch.optim.Adam(
        [{"params": offsets, "lr": _OFFSET_LR}, {"params": stretches, "lr": _SCALE_LR}],
        betas=(0.9, 0.99),
        fused=walk.device.type == "cuda",
    )
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randperm(len(inputs), generator=generator)[:_BATCH_WINDOWS] for _ in range(iterations)
    ]
    before = torch.zeros((), device=walk.device)
    for step, chosen in enumerate(batches):
        # by hand: torch's schedulers tie themselves and the optimizer's memory into a cycle
        for settings, rate in zip(optimizer.param_groups, (_OFFSET_LR, _SCALE_LR), strict=True):
            settings["lr"] = rate * (1 - step / iterations)
        with torch.enable_grad():
            made = {name: own.weight().to(inputs.dtype) for name, own in soft.items()}
            # the layer's gradients are summed over the windows first, and pass the rounding once
            weights = {name: w.detach().requires_grad_() for name, w in made.items()}
            for windows in chosen.split(walk.batch_windows):
                error = _error(walk, layer, fixed | weights, inputs, outputs, importance, windows)
                part = error * (len(windows) / len(chosen))
                part.backward()
                if step == 0:
                    before += part.detach()
            torch.autograd.backward(list(made.values()), [w.grad for w in weights.values()])
        optimizer.step()
        optimizer.zero_grad()
    learned = {name: own.harden() for name, own in soft.items()}
    weights = {name: dequantize(weight, inputs.dtype) for name, weight in learned.items()}
    after = sum(
        _error(walk, layer, fixed | weights, inputs, outputs, importance, windows).item()
        * len(windows)
        for windows in batches[0].split(walk.batch_windows)
    ) / len(batches[0])
    for name, weight in learned.items():
        quantized.linears[name] = quantized.linears[name]._replace(weight=weight)
    return before.item(), after


def _soften(quantized: QuantizedLayer, name: str) -> _Soft:
    weight, scheme, _ = quantized.linears[name]
    assert scheme.weights.kind == "int"
    assert scheme.activations is None
    codes = weight.codes.float()
    wanted = quantized.targets[name] / expand(step_size(weight), codes.shape)
    if weight.zero_point is not None:
        wanted = wanted + expand(weight.zero_point.float(), codes.shape)
    position = codes + (wanted - codes).clamp_(-_EDGE, _EDGE)
    return _Soft(
        weight,
        scheme.weights.bits,
        position,
        torch.zeros_like(position, requires_grad=True),
        torch.zeros_like(weight.scale, dtype=torch.float32, requires_grad=True),
    )


def _error(
    walk: DecoderWalk,
    layer: nn.Module,
    weights: dict[str, Tensor],
    inputs: Tensor,
    outputs: Tensor,
    importance: Importance,
    windows: Tensor,
) -> Tensor:
    """Mean over tokens of Σ channels · (output - wanted)², times what each token counts, for the chosen
    windows. weights: by linear layer."""
    parameters = {f"{name}.weight": weight for name, weight in weights.items()}
    # window by window: a slice of pinned memory is pinned, a gathered copy is not
    sent, wanted = (
        torch.stack([hidden[i].to(walk.device, non_blocking=True) for i in windows.tolist()])
        for hidden in (inputs, outputs)
    )
    arguments = {"position_embeddings": walk.positions(layer)}
    output: Tensor = torch.func.functional_call(layer, parameters, (sent,), arguments)
    wanted = wanted.float()
    errors = (output.float() - wanted).square() @ importance.channels
    if importance.tokens is None:
        return (errors / wanted.square().sum(dim=-1).clamp(min=1e-12)).mean()
    return (errors * importance.tokens[windows.to(importance.tokens.device)]).mean()
