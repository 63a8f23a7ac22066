"""Fake quantization: weights and inputs rounded to their grid while they train.

Start at `FakeWeight`. It holds the scales of a quantized weight and makes the weight that the
checkpoint will have from one that gradients can move. Gradients pass the rounding as if it were not
there, and stop where the grid ends (straight-through, arXiv 1308.3432). Scales are learned too, unless
they are powers of two or a whole tensor's; their gradient is LSQ's (arXiv 1902.08153, equation 3), which
follows from the same rule. `harden` gives the codes: the very numbers that the last forward pass used.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tinier.kernels import round_activations
from tinier.numerics import (
    Quantized,
    dequantize,
    expand,
    in_blocks,
    round_static,
    step_size,
    storable_scale,
)
from tinier.quantization.scales import Fit, round_nearest, round_scaled, storable_block_scale
from tinier.schemes import Grid

# a weight that lies in the cell of another code is moved to just inside the cell of its own
_EDGE = 0.49


class FakeWeight(nn.Module):
    """A weight [out, in] float32 to the one that its codes stand for; a torch parametrization."""

    scale: Tensor
    stretch: nn.Parameter | None
    zero_point: Tensor | None
    global_scale: Tensor | None

    def __init__(self, start: Quantized, grid: Grid) -> None:
        super().__init__()
        self._grid = grid
        self.register_buffer("scale", start.scale, persistent=False)
        self.register_buffer("zero_point", start.zero_point, persistent=False)
        self.register_buffer("global_scale", start.global_scale, persistent=False)
        self.stretch = None
        if grid.scale_format != "e8m0" and grid.granularity != "tensor":
            # powers of two do not move, and a tensor's scale is that of the layers fused with it too;
            # each other scale is multiplied by one plus it
            zeros = torch.zeros_like(start.scale, dtype=torch.float32)
            self.stretch = nn.Parameter(zeros)

    def forward(self, weight: Tensor) -> Tensor:
        """weight: [out, in]. Returns the rounded weight, of the same shape: in float32, or in what
        autocast would make of it."""
        zero = None if self.zero_point is None else self.zero_point.float()
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device)
        if not torch.is_autocast_enabled(device):
            dtype = torch.float32
        return _Rounded.apply(weight.float(), self._step(), zero, self._grid, dtype)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def harden(self, weight: Tensor, stretch: Tensor | None) -> Quantized:
        """The codes and scales that `forward` computes with. weight, stretch: whole, where this
        module's own are sharded."""
        scale = self.scale
        if stretch is not None:
            stretch = stretch.to(scale.device)
            scale = self._storable(scale.float() * (1 + stretch))
        fit = Fit(scale, self.zero_point, self.global_scale)
        return round_nearest(weight.to(scale.device), fit, self._grid)

    def _step(self) -> Tensor:
        """[R, C] float32: what a checkpoint's reader makes of the stored scale."""
        scale = self.scale
        if self.stretch is not None:
            wanted = scale.float() * (1 + self.stretch)
            scale = wanted + (self._storable(wanted.detach()).float() - wanted).detach()
        return Fit(scale, self.zero_point, self.global_scale).step

    def _storable(self, scale: Tensor) -> Tensor:
        if self._grid.scale_format == "e4m3":
            return storable_block_scale(scale)
        return storable_scale(scale, self.scale.dtype)


class _Rounded(torch.autograd.Function):
    """A weight [out, in] rounded with steps [R, C], both float32; nothing else is kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, step, zero)
        ctx.grid = grid
        if weight.is_cuda:
            from tinier.kernels.fake_weight import (
                rounded_cuda,
            )  # Triton is there on GPU machines only

            return rounded_cuda(weight, step, zero, grid, dtype)
        _, codes, step = _scaled(weight, step, zero, grid)
        return codes.mul_(step).reshape(weight.shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """From rounded = code · step, where the code moves by 1 / step with the weight, and by
        -weight / step² with the step, until the grid ends."""
        weight, step, zero = ctx.saved_tensors
        grid = ctx.grid
        if weight.is_cuda:
            from tinier.kernels.fake_weight import gradients_cuda

            return (*gradients_cuda(weight, step, zero, grid, outer), None, None, None)
        scaled, codes, _ = _scaled(weight, step, zero, grid)
        outer = in_blocks(outer.float(), step.shape)
        position = scaled if zero is None else scaled + zero[:, None, :, None]
        lowest, highest = grid.code_range
        moves = (position >= lowest) & (position <= highest)
        to_step = (outer * codes.sub_(scaled.mul_(moves))).sum(dim=(1, 3))
        return (outer * moves).reshape(weight.shape), to_step, None, None, None


def _scaled(
    weight: Tensor, step: Tensor, zero: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight over its step, the nearest codes less the zero point, and the step: in blocks."""
    step = step[:, None, :, None]
    zeros = None if zero is None else zero[:, None, :, None]
    scaled = in_blocks(weight, (step.shape[0], step.shape[2])) / step
    codes = round_scaled(scaled, grid, zeros)
    return scaled, codes if zeros is None else codes.sub_(zeros), step


@torch.no_grad()
def trainable_weight(target: Tensor, quantized: Quantized, grid: Grid) -> Tensor:
    """A float32 weight [out, in] that rounds to exactly the codes of `quantized`, and is otherwise as
    near to `target` as it can be: where a weight stands in its cell decides which way it goes first.
    """
    fit = Fit(quantized.scale, quantized.zero_point, quantized.global_scale)
    target = target.float()
    if grid.kind == "int":
        step = expand(step_size(quantized), target.shape)
        codes = quantized.codes.float()
        zero = 0.0
        if quantized.zero_point is not None:
            zero = expand(quantized.zero_point.float(), target.shape)  # type: ignore[assignment]
        inside = codes + (target / step + zero - codes).clamp(-_EDGE, _EDGE)
        return (inside - zero) * step
    # the cells of a float grid are not alike: the weight, or the value of its code
    same = round_nearest(target, fit, grid).codes.float() == quantized.codes.float()
    return torch.where(same, target, dequantize(quantized, torch.float32))


def fake_cache(x: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """Keys or values [..., head_dim] as a quantized cache gives them back; gradients pass straight through.

    scale: [1], the stored one.
    """
    rounded = round_static(x.detach(), grid.kind, scale.to(x.device)).to(x.dtype)
    return x + (rounded - x).detach()


def fake_inputs(x: Tensor, activations: Grid, input_scale: Tensor | None) -> Tensor:
    """A linear layer's inputs [..., in], rounded; gradients pass straight through."""
    return x + (round_activations(x.detach(), activations, input_scale) - x).detach()
