"""Quantize one decoder layer: equalize, fit scales, round; and put the result back into the module.

Start at `quantize_layer`. In: transformers' module of the layer with its 16-bit weights, the preset of
each linear layer, statistics of their inputs. Out: the tensors to store, and what was lost. Linear
layers that share an input are worked on as one matrix, with one Hessian.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinier.calibration import Drift, InputStatistics, reaches
from tinier.checkpoint import pack_linear, unpack_linear
from tinier.families import Geometry, Input
from tinier.kernels import calibrated_scale, round_activations
from tinier.numerics import Quantized, dequantize, power_db, snr_db
from tinier.quantization.awq import awq_factors
from tinier.quantization.folding import fold, shared
from tinier.quantization.gptq import DAMP, Inverse, gptq
from tinier.quantization.rescale import can_rescale, rescaled
from tinier.quantization.scales import absmax_scales, round_nearest, searched_scales
from tinier.quantization.smoothquant import smooth_factors
from tinier.ranks import ALONE, Ranks
from tinier.schemes import Algorithm, Preset, Scheme

LayerPresets = dict[str, Preset]
"""Preset by name of the linear layer inside the decoder layer; layers left out stay in 16 bit."""


class QuantizedLinear(NamedTuple):
    weight: Quantized
    scheme: Scheme
    input_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        parts = {**self.weight._asdict(), "input_scale": self.input_scale}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], name: str, scheme: Scheme) -> "QuantizedLinear":
        """The linear layer that `tensors` has under NAME.PART."""
        parts = {part: tensors.get(f"{name}.{part}") for part in Quantized._fields}
        return cls(Quantized(**parts), scheme, tensors.get(f"{name}.input_scale"))  # type: ignore[arg-type]


@dataclass(slots=True)
class QuantizedLayer:
    """A decoder layer, quantized, on the device."""

    linears: dict[str, QuantizedLinear]
    others: dict[str, Tensor]
    """Everything else by name: norms, biases, weights left in 16 bit"""
    targets: dict[str, Tensor]
    """float32 weights that the codes stand for: folded, drift corrected, not rounded"""
    statistics: dict[str, InputStatistics]
    """Of the layer's inputs as they are after folding, by name"""
    inputs: tuple[Input, ...]
    factors: dict[str, Tensor] = field(default_factory=dict)
    """What inputs were divided by to equalize them, [in], by name"""
    warnings: list[str] = field(default_factory=list)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What is stored, by full name."""
        stored = {f"{prefix}.{name}": tensor for name, tensor in self.others.items()}
        for name, (weight, scheme, input_scale) in self.linears.items():
            for part, tensor in pack_linear(weight, scheme, input_scale).items():
                stored[f"{prefix}.{name}.{part}"] = tensor
        return stored

    def measures(self) -> dict[str, dict[str, float | None]]:
        """By linear layer: `snr_db` of its weight and, where its inputs were seen, of its output."""
        measured = {}
        for read in self.inputs:
            seen = self.statistics.get(read.name)
            for name in read.readers:
                if name in self.linears:
                    measured[name] = _measure(self.targets[name], self.linears[name].weight, seen)
        return measured


def first_moments(geometry: Geometry, presets: LayerPresets, *, corrects_drift: bool) -> set[str]:
    """The inputs of a layer whose second moments the first look at it must find, by name."""
    wanted = set()
    for read in geometry.inputs:
        for algorithm in {presets[name].algorithm for name in read.readers if name in presets}:
            anew = corrects_drift and _seen_anew(geometry, read, algorithm)
            if algorithm.equalize == "awq" or (algorithm.needs_data and not anew):
                wanted.add(read.name)
    return wanted


def _seen_anew(geometry: Geometry, read: Input, algorithm: Algorithm) -> bool:
    """Whether, with drift corrected, an input's second moments are those of what the part of the layer that
    is quantized already gives."""
    return reaches(geometry, read) and algorithm.rounding != "nearest"


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    presets: LayerPresets,
    statistics: dict[str, InputStatistics],
    geometry: Geometry,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
    drift: Drift | None = None,
) -> QuantizedLayer | None:
    """Quantize the linear layers of a decoder layer. Folding changes norms and biases of `layer`.

    statistics: by the input's name; empty where no preset looks at the inputs. dtype: of stored scales.
    ranks: that share the work; the result is the first one's, None on the others. drift: where weights make
    up for what the layers before, and the groups before in this one, have changed.
    """
    weights = {name: layer.get_parameter(f"{name}.weight").float() for name in geometry.linears}
    device = next(iter(weights.values())).device
    seen, divided = dict(statistics), dict[str, Tensor]()
    for read in geometry.inputs:
        preset = presets.get(read.readers[0])
        if preset is None or preset.algorithm.equalize == "none" or read.name not in seen:
            continue
        if read.source is None or not seen[read.name].tokens:
            continue  # nothing stands before it that could take the factors; an expert that saw nothing
        if read.source in weights and read.source not in presets:
            continue  # the rows to fold into stay in 16 bit, where a factor would round them anew
        factors = _factors(preset, weights, read, seen[read.name], geometry)
        applied = fold(layer, weights, read, factors, geometry)
        seen[read.name] = seen[read.name].divided_by(applied)
        divided[read.name] = applied
    targets = {name: weight for name, weight in weights.items() if name in presets}
    result = QuantizedLayer({}, {}, targets, seen, geometry.inputs, divided)
    if geometry.mixture is not None and seen:
        _share_ranges(seen, geometry)
        result.warnings += _hardly_seen(seen, geometry)
    groups = {read.name: [n for n in read.readers if n in presets] for read in geometry.inputs}
    made = {}
    if drift is not None:
        folded_layer = _folded(layer, weights, dtype)
        made = _in_turn(result, folded_layer, groups, presets, drift, geometry, dtype, ranks)
    left = {
        read.name: groups[read.name]
        for read in geometry.inputs
        if drift is None or not reaches(geometry, read)
    }
    owners = _owners({g: _work(targets, names) for g, names in left.items()}, ranks.size)
    made |= {
        group: _quantize_group(targets, names, presets, seen.get(group), dtype)
        for group, names in left.items()
        if names and owners[group] == ranks.rank
    }
    tensors = ranks.merge(
        {f"{name}.{part}": tensor for group in made.values()
         for name, linear in group.linears.items() for part, tensor in linear.tensors().items()},
        device,
    )  # fmt: skip
    told = ranks.collect({group: value.warnings for group, value in made.items()})
    if not ranks.writes:
        return None
    warnings = {group: found for each in told for group, found in each.items()}
    for group, names in groups.items():  # in one order, whoever made it
        for name in names:
            result.linears[name] = QuantizedLinear.of(tensors, name, presets[name].scheme)
        result.warnings += warnings.get(group, [])
    folded = {f"{name}.weight": weights[name].to(dtype) for name in weights if name not in presets}
    kept = {n: t for n, t in layer.state_dict().items() if n.removesuffix(".weight") not in presets}
    result.others = kept | folded
    return result


def _folded(layer: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of the layer with these weights [out, in], into which factors may be folded."""
    copied = copy.deepcopy(layer)
    for name, weight in weights.items():
        copied.get_parameter(f"{name}.weight").data = weight.to(dtype)
    return copied


def _in_turn(
    result: QuantizedLayer, layer: nn.Module, groups: dict[str, list[str]], presets: LayerPresets,
    drift: Drift, geometry: Geometry, dtype: torch.dtype, ranks: Ranks,
) -> dict[str, "_Group"]:  # fmt: skip
    """Quantize the groups whose inputs' drift is known, each on what those before it give; the first rank
    does, and all see it.

    Changes the targets, the statistics and the weights of `layer`.
    """
    made, targets, seen = {}, result.targets, result.statistics
    for read in result.inputs:
        names = groups[read.name]
        if not names or not reaches(geometry, read):
            continue
        preset = presets[names[0]]
        input_scale = _input_scale(preset, seen.get(read.name))
        if _seen_anew(geometry, read, preset.algorithm):
            grid = preset.scheme.activations
            rounding = (
                None
                if grid is None
                else partial(round_activations, grid=grid, input_scale=input_scale)
            )
            sums = drift.at(read, layer, result.factors.get(read.name), rounding)
            seen[read.name] = replace(
                seen[read.name], moments=sums.moments, mean_square=sums.moments.diagonal().clone()
            )
            rows = [targets[name].shape[0] for name in names]
            together = sums.corrected(torch.cat([targets[name] for name in names]))
            targets |= dict(zip(names, together.split(rows), strict=True))
        rounded: dict[str, Tensor] = {}
        if ranks.writes:
            made[read.name] = _quantize_group(targets, names, presets, seen.get(read.name), dtype)
            rounded = {
                name: dequantize(linear.weight, dtype)
                for name, linear in made[read.name].linears.items()
            }
        device = targets[names[0]].device
        for name, weight in ranks.spread(rounded, device).items():
            layer.get_parameter(f"{name}.weight").data = weight
            if preset.scheme.activations is not None:
                layer.get_submodule(name).register_forward_pre_hook(
                    _rounding(preset.scheme, input_scale)
                )
    return made


def _share_ranges(seen: dict[str, InputStatistics], geometry: Geometry) -> None:
    """Give the experts of a layer one range of inputs: those that few tokens reach do not know theirs, and
    servers multiply them with one static scale."""
    _, *experts = geometry.blocks
    for alike in zip(*experts, strict=True):  # the first inputs of all, the last ones of all
        most = torch.stack([seen[read.name].absmax.max() for read in alike]).max()
        for read in alike:
            seen[read.name] = replace(
                seen[read.name], absmax=most.expand_as(seen[read.name].absmax)
            )


def _hardly_seen(seen: dict[str, InputStatistics], geometry: Geometry) -> list[str]:
    """A warning about experts that saw fewer tokens than they have inputs."""
    _, *experts = geometry.blocks
    tokens = [seen[first.name].tokens for first, _ in experts]
    few = {number: count for number, count in enumerate(tokens) if count < geometry.hidden}
    if not few:
        return []
    return [
        f"experts {', '.join(map(str, few))} of {geometry.experts} saw fewer tokens than their "
        f"{geometry.hidden} inputs (at least {min(few.values())}): they fit this text, or are rounded "
        "without any. Give more"
    ]


def _factors(
    preset: Preset,
    weights: dict[str, Tensor],
    read: Input,
    seen: InputStatistics,
    geometry: Geometry,
) -> Tensor:
    """The equalization factors [in] of one input."""
    weight = torch.cat([weights[name] for name in read.readers])
    if preset.algorithm.equalize == "smoothquant":
        absmax = shared(seen.absmax, read, geometry)
        factors = smooth_factors(weight, absmax, seen.sample, preset.scheme)
    else:
        assert seen.moments is not None
        mean_abs = shared(seen.mean_abs, read, geometry)
        factors = awq_factors(weight, seen.moments, mean_abs, preset.scheme.weights)
    return shared(factors, read, geometry)


def _work(targets: dict[str, Tensor], names: list[str]) -> int:
    """About what a group costs: solving for its inputs, and the walk along its columns."""
    if not names:
        return 0
    rows, columns = sum(targets[name].shape[0] for name in names), targets[names[0]].shape[1]
    return columns**3 + rows * columns**2


def _owners(work: dict[str, int], ranks: int) -> dict[str, int]:
    """Which rank makes which group: the largest first, each to the one that has least, the last of equal
    ones: the first rank writes, too."""
    loads, owners = [0] * ranks, {}
    for group in sorted(work, key=lambda group: -work[group]):
        owner = min(reversed(range(ranks)), key=lambda rank: loads[rank])
        owners[group] = owner
        loads[owner] += work[group]
    return owners


class _Group(NamedTuple):
    linears: dict[str, QuantizedLinear]
    warnings: list[str]


def _quantize_group(
    targets: dict[str, Tensor],
    names: list[str],
    presets: LayerPresets,
    seen: InputStatistics | None,
    dtype: torch.dtype,
) -> _Group:
    """Quantize linear layers that share an input; one that was never seen without looking at it."""
    warnings = []
    blind = seen is not None and not seen.tokens
    preset = presets[names[0]]
    grid, algorithm = preset.scheme.weights, preset.algorithm
    input_scale = _input_scale(preset, seen)
    inverse = None
    if algorithm.rounding != "nearest" and not blind:
        assert seen is not None
        assert seen.moments is not None
        inverse = Inverse(seen.moments)
        if inverse.damp > DAMP:
            warnings.append(
                f"{' '.join(names)}: the Hessian needed damping of {inverse.damp:g} (usual: {DAMP:g})"
            )
    importance = seen.mean_square if seen and not blind else None
    # as one matrix, in one walk along the columns. Servers multiply q, k, v and gate, up so, with one scale
    # for the whole tensor (FP8), or one over the scales (NVFP4), where the format has such: vLLM and
    # TensorRT-LLM take the largest of the parts' and would scale the others wrongly
    target = torch.cat([targets[name] for name in names])
    if algorithm.scales == "error":
        fit = searched_scales(target, grid, dtype, importance)
    else:
        fit = absmax_scales(target, grid, dtype)
    weight = gptq(target, inverse, fit, grid) if inverse else round_nearest(target, fit, grid)
    moments = None if seen is None or blind else seen.moments
    if algorithm.scales == "error" and moments is not None and can_rescale(grid):
        weight = rescaled(target, weight, moments, inverse.damp if inverse else DAMP)
    parts = _split(weight, [targets[name].shape[0] for name in names])
    linears = {
        name: QuantizedLinear(part, preset.scheme, input_scale)
        for name, part in zip(names, parts, strict=True)
    }
    return _Group(linears, warnings)


def _input_scale(preset: Preset, seen: InputStatistics | None) -> Tensor | None:
    """The calibrated scale of an input, where the scheme has one."""
    return calibrated_scale(preset.scheme, None if seen is None else seen.absmax)


def _split(weight: Quantized, rows: list[int]) -> list[Quantized]:
    """The linear layers that were stacked, `rows` output channels each. A scale of the whole is each
    one's."""
    stacked, blocks = sum(rows), weight.scale.shape[0]

    def parts(scales: Tensor) -> list[Tensor]:
        if blocks == 1:
            return [scales] * len(rows)
        return list(scales.split([count * blocks // stacked for count in rows]))

    codes, scales = weight.codes.split(rows), parts(weight.scale)
    zeros = [None] * len(rows) if weight.zero_point is None else parts(weight.zero_point)
    return [
        Quantized(c, s, z, weight.global_scale)
        for c, s, z in zip(codes, scales, zeros, strict=True)
    ]


def _measure(
    target: Tensor, weight: Quantized, seen: InputStatistics | None
) -> dict[str, float | None]:
    rounded = dequantize(weight, torch.float32)
    measures = {"snr_db": snr_db(target, rounded)}
    if seen is not None and seen.tokens:
        error = _power(rounded - target, seen)
        measures["output_snr_db"] = power_db(_power(target, seen), error)
    return measures


def _power(weight: Tensor, seen: InputStatistics) -> float:
    """Mean square of weight·x, summed over outputs; without moments as if inputs were independent."""
    if seen.moments is None:
        return (weight.square() @ seen.mean_square).sum().item()
    return ((weight @ seen.moments) * weight).sum().item()


def install(
    layer: nn.Module, prefix: str, tensors: dict[str, Tensor], presets: LayerPresets
) -> None:
    """Make a module compute what its stored, quantized tensors say: weights and rounded inputs.

    tensors: by full name, as `QuantizedLayer.tensors` gives them.
    """
    schemes = {name: preset.scheme for name, preset in presets.items()}
    for name, tensor in tensors.items():
        inside = name.removeprefix(f"{prefix}.")
        if any(
            inside.startswith(f"{linear}.") and not inside.endswith(".bias") for linear in schemes
        ):
            continue
        if inside in ("self_attn.k_scale", "self_attn.v_scale"):
            continue
        layer.get_parameter(inside).data = tensor
    for name, scheme in schemes.items():
        weight = layer.get_parameter(f"{name}.weight")
        quantized, input_scale = unpack_linear(tensors.get, f"{prefix}.{name}", scheme)
        weight.data = dequantize(quantized, weight.dtype)
        if scheme.activations is not None:
            rounding = _rounding(scheme, input_scale)
            layer.get_submodule(name).register_forward_pre_hook(rounding)


def _rounding(scheme: Scheme, input_scale: Tensor | None) -> Callable[..., tuple[Tensor]]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        assert scheme.activations is not None
        return (round_activations(inputs[0], scheme.activations, input_scale),)

    return hook
