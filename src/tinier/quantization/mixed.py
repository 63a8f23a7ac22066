"""Mixed precision: give more bits to the layers that need them, within an average.

Start at `measure_sensitivity`. Linear layers that share an input are one choice, for engines fuse
them. Each choice is rounded to few bits on its own and the divergence that it alone causes at the
model's output is measured; `pick_wide` then spends the bits where they save most divergence.
"""

import copy

import torch
from torch import Tensor, nn

from tinier.calibration import DecoderWalk, mean_divergences
from tinier.checkpoint import Checkpoint
from tinier.errors import SchemeError
from tinier.families import (
    EMBEDDING,
    EMBEDDING_MODULE,
    FINAL_NORM,
    HEAD,
    HEAD_LINEAR,
    Geometry,
    geometry_of,
    layer_name,
    linear_shape,
    norm_weight,
)
from tinier.kernels import output_logits
from tinier.numerics import dequantize
from tinier.progress import bar
from tinier.quantization.plan import MIXED_HIGH, stored_bytes
from tinier.quantization.scales import round_nearest, searched_scales
from tinier.schemes import Preset, preset_named

_TOKENS = 1024


@torch.no_grad()
def measure_sensitivity(
    source: Checkpoint,
    walk: DecoderWalk,
    presets: dict[str, Preset],
    windows: Tensor,
) -> dict[str, float]:
    """KL divergence at the output, in nats per token, that each choice causes when it alone is rounded.

    presets: the narrow one of every layer. windows: [n, length]; the first ones of about 1,024 tokens
    are used. A choice is named after its first linear layer. One walk over the layers: every choice
    starts a stream of hidden states of its own, which the later layers carry on.
    """
    geometry = geometry_of(source)
    windows = windows[: max(1, _TOKENS // windows.shape[1])]
    exact = walk.embed(windows)
    streams: dict[str, Tensor] = {}
    with bar("sensitivity", geometry.layers) as advance:
        for index in range(geometry.layers):
            layer, prefix = walk.load(index), layer_name(index)
            for stream in streams.values():
                walk.run(layer, stream, stream)
            for group in geometry.inputs:
                names = [n for n in group.readers if f"{prefix}.{n}" in presets]
                if names:
                    rounded = _rounded(layer, names, presets[f"{prefix}.{names[0]}"], source.dtype)
                    streams[f"{prefix}.{names[0]}"] = walk.run(
                        rounded, exact, torch.empty_like(exact)
                    )
            walk.run(layer, exact, exact)
            advance(1)
    with source.reader(walk.device) as read:
        norm = norm_weight(read(FINAL_NORM), geometry)
        head = read(EMBEDDING if geometry.tied_head else HEAD)

    def logits(hidden: Tensor) -> Tensor:
        return output_logits(hidden, norm, head, geometry.norm_eps, geometry.multipliers.logits)

    others = [(stream, logits) for stream in streams.values()]
    found = mean_divergences((exact, logits), others, walk.device)
    return dict(zip(streams, found, strict=True))


def pick_wide(
    source: Checkpoint, sensitivity: dict[str, float], presets: dict[str, Preset], bits: float
) -> frozenset[str]:
    """Full names of the linear layers that get the wide preset, so that a quantized weight takes at
    most `bits` bits on average, scales included.

    The choices that save most divergence for each bit come first. Raises SchemeError for an average
    that cannot be kept.
    """
    geometry = geometry_of(source)
    wide_scheme = preset_named(MIXED_HIGH).scheme
    layers = [name for name in presets if name not in (EMBEDDING_MODULE, HEAD_LINEAR)]
    shapes = {name: linear_shape(geometry, name) for name in layers}
    weights = sum(rows * columns for rows, columns in shapes.values())
    narrow = {n: 8 * stored_bytes(presets[n].scheme, shapes[n], source.dtype) for n in layers}
    wide = {n: 8 * stored_bytes(wide_scheme, shapes[n], source.dtype) for n in layers}
    spent = sum(narrow.values())
    if bits * weights < spent:
        raise SchemeError(
            f"bits={bits} is below {spent / weights:.2f}, which the narrow preset alone takes. "
            f"Use a number between it and {sum(wide.values()) / weights:.2f}."
        )
    picked: set[str] = set()
    members = {choice: _members(choice, layers, geometry) for choice in sensitivity}
    extra = {c: sum(wide[n] - narrow[n] for n in names) for c, names in members.items()}
    for choice in sorted(sensitivity, key=lambda c: sensitivity[c] / extra[c], reverse=True):
        if spent + extra[choice] <= bits * weights:
            spent += extra[choice]
            picked.update(members[choice])
    return frozenset(picked)


def _members(choice: str, layers: list[str], geometry: Geometry) -> list[str]:
    """The linear layers that share their input with the one that names the choice."""
    prefix, inside = ".".join(choice.split(".")[:3]), choice.split(".", 3)[3]
    group = next(read.readers for read in geometry.inputs if inside in read.readers)
    return [f"{prefix}.{name}" for name in group if f"{prefix}.{name}" in layers]


def _rounded(layer: nn.Module, names: list[str], preset: Preset, dtype: torch.dtype) -> nn.Module:
    """A copy of the layer with the named linear layers rounded to nearest."""
    rounded = copy.deepcopy(layer)
    grid = preset.scheme.weights
    for name in names:
        weight = rounded.get_parameter(f"{name}.weight")
        fit = searched_scales(weight, grid, dtype)
        weight.data = dequantize(round_nearest(weight, fit, grid), weight.dtype)
    return rounded
