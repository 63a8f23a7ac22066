"""Mixed precision: the format of each layer, so that the whole keeps within its bytes and loses least.

Linear layers that share an input are one part, for engines fuse them. Three steps:

1. `Rounded.make`: each part is rounded to each format by GPTQ, on the inputs that it has in the original
   model, and kept. Beside it the error of its outputs, E‖(W - Ŵ)x‖².
2. `measure_parts`: the divergence at the model's output that each part alone causes, in one format of each
   number of bits. A small divergence is quadratic in the change of the weights (Malinovskii et al. 2024,
   arXiv:2411.17525), so that those of the other formats lie on a line through these, along the error.
   `allocate` spends the bytes where the sum is least.
3. `search`: the sum is wrong at few bits, where errors of one layer meet those of others. Whole models are
   put together from what is kept, and their real divergence decides: the solutions for costs that are
   varied at random around the best so far, each of which keeps within the bytes.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinier.calibration import (
    DecoderWalk,
    InputStatistics,
    KeysAndValues,
    mean_divergences,
    norm_and_head,
    observe,
)
from tinier.checkpoint import (
    Checkpoint,
    check_disk,
    new_file,
    pack_linear,
    stored_shapes,
    write_atomically,
)
from tinier.families import (
    EMBEDDING,
    Geometry,
    geometry_of,
    layer_name,
    linear_names,
)
from tinier.kernels import output_logits, static_scale
from tinier.numerics import Quantized, dequantize
from tinier.progress import bar, say
from tinier.quantization.allocation import Options, allocate
from tinier.quantization.layer import QuantizedLayer, install, quantize_layer
from tinier.quantization.plan import (
    SIXTEEN_BIT,
    QuantizePlan,
    chosen_presets,
    embedding_preset,
    kv_grid,
    mixed_formats,
    stored_bytes,
    table_group,
)
from tinier.quantization.scales import round_table
from tinier.ranks import ALONE
from tinier.schemes import Preset, Scheme

_PART_TOKENS = 1024
"""Of a part's divergence, alone in the model"""
_WHOLE_TOKENS = 4096
"""Of a whole model's"""
_STREAMS_BYTES = 4 << 30
"""Hidden states of models that are measured side by side, on the host"""
_KV_ABSMAX = "kv_absmax"
_FLOOR = "floor"
_BROKEN = 1e3
"""Nats that stand for numbers that are none"""
_ROUNDS, _AT_ONCE = 4, 4
_SPREAD, _COOLING = 0.25, 0.8
"""Of the logarithms of costs, at first, and how it shrinks a round"""


class Part(NamedTuple):
    """Linear layers that share an input."""

    layer: int
    input: str
    """Its name among Geometry.inputs"""
    readers: tuple[str, ...]
    """By name inside the layer"""

    @property
    def name(self) -> str:
        """The full name of the first"""
        return f"{layer_name(self.layer)}.{self.readers[0]}"

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(f"{layer_name(self.layer)}.{reader}" for reader in self.readers)


def parts_of(geometry: Geometry, without: frozenset[str] = frozenset()) -> list[Part]:
    """All of a model. without: full names of layers that stay in 16 bit."""
    found = []
    for index in range(geometry.layers):
        for read in geometry.inputs:
            readers = tuple(r for r in read.readers if f"{layer_name(index)}.{r}" not in without)
            if readers:
                found.append(Part(index, read.name, readers))
    return found


Choice = Mapping[str, str]
"""A format by the name of a part; `EMBEDDING_PART` and `KV_PART` are such names too. What is left out, or
called 16bit, is the original's"""
EMBEDDING_PART, KV_PART = "embedding", "kv"
EMBEDDING_FORMATS, KV_FORMATS = ("int8", "int4"), ("fp8", "int8")


class Rounded:
    """Every part in every format, in `folder`: a file of codes a layer, and their errors."""

    def __init__(
        self, source: Checkpoint, walk: DecoderWalk, formats: Mapping[str, Preset],
        parts: list[Part], folder: Path,
    ) -> None:  # fmt: skip
        self.source, self.walk, self.formats, self.parts = source, walk, formats, parts
        self.geometry = geometry_of(source)
        self._folder = folder
        self._tables: dict[str, Quantized] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def make(self, windows: Tensor) -> None:
        """Round what is not there yet, on calibration windows [n, length]."""
        done = sum(self._errors(i).exists() for i in range(self.geometry.layers))
        if done == self.geometry.layers:
            return
        needed = sum(sum(of.values()) for of in part_bytes(self).values())
        there = sum(path.stat().st_size for path in self._folder.iterdir())
        check_disk(self._folder, int(needed) - there)
        hidden = self.walk.embed(windows)
        with bar("round to each format", self.geometry.layers) as advance:
            for index in range(self.geometry.layers):
                layer = self.walk.load(index)
                if index >= done:
                    cache = KeysAndValues(None)
                    seen, _ = observe(
                        self.walk, layer, self.geometry, hidden, len(windows), ALONE,
                        moments=[read.name for read in self.geometry.inputs], cache=cache,
                    )  # fmt: skip
                    self._round(index, layer, seen, cache.absmax)
                self.walk.run(layer, hidden, hidden)
                advance(1)

    def errors(self) -> dict[str, dict[str, float]]:
        """E‖(W - Ŵ)x‖², summed over a part's outputs, by part and format."""
        found: dict[str, dict[str, float]] = {}
        for index in range(self.geometry.layers):
            found |= json.loads(self._errors(index).read_text(encoding="utf-8"))
        return found

    def cache(self, index: int, kind: str | None) -> KeysAndValues | None:
        """What rounds the keys and values of a layer as a cache of `kind` (fp8, int8) would."""
        grid = kv_grid(None if kind == SIXTEEN_BIT else kind)
        if grid is None:
            return None
        with safe_open(self._codes(index), "pt", device=str(self.walk.device)) as file:
            key, value = (static_scale(most, grid) for most in file.get_tensor(_KV_ABSMAX))
        return KeysAndValues.static(grid.kind, key, value)

    def table(self, kind: str | None) -> Quantized | None:
        """The embedding as `kind` (int8, int4, fp8), rounded once."""
        if kind in (None, SIXTEEN_BIT):
            return None
        assert kind is not None
        if kind not in self._tables:
            grid = embedding_preset(kind, table_group(self.geometry)).scheme.weights
            with self.source.reader(self.walk.device) as read:
                self._tables[kind] = round_table(read(EMBEDDING), grid, self.source.dtype)
        return self._tables[kind]

    def install(self, module: nn.Module, index: int, labels: Choice) -> None:
        """Put parts of one layer into its module. labels: the format by part; others stay as they are."""
        own = [
            part
            for part in self.parts
            if part.layer == index and labels.get(part.name, SIXTEEN_BIT) != SIXTEEN_BIT
        ]
        if not own:
            return
        with safe_open(self._codes(index), "pt", device=str(self.walk.device)) as file:
            for part in own:
                label = labels[part.name]
                preset = self.formats[label]
                names = {
                    f"{member}.{kind}": f"{label}/{member}.{kind}"
                    for member in part.members
                    for kind in stored_shapes(preset.scheme, self.geometry.linears[part.readers[0]])
                }
                tensors = {
                    name: file.get_tensor(key)
                    for name, key in names.items()
                    if key in file.keys()  # noqa: SIM118
                }
                self._divide_inputs(module, part, label, file)
                install(module, layer_name(index), tensors, dict.fromkeys(part.readers, preset))
                self._undo_folding(module, part, label, file)

    def _divide_inputs(self, module: nn.Module, part: Part, label: str, file: Any) -> None:
        """Divide what a part reads by the factors that its columns were multiplied with: they are folded
        into what stands before it in a quantized model, but here that may be in another format."""
        key = f"{label}/{part.input}.factors"
        if key not in file.keys():  # noqa: SIM118
            return
        factors = file.get_tensor(key)
        for reader in part.readers:
            module.get_submodule(reader).register_forward_pre_hook(partial(_divided, factors))

    def _undo_folding(self, module: nn.Module, part: Part, label: str, file: Any) -> None:
        """Multiply the rows of a part that factors of a later input were folded into."""
        for read in self.geometry.inputs:
            key = f"{label}/{read.name}.factors"
            if read.source not in part.readers or key not in file.keys():  # noqa: SIM118
                continue
            factors = file.get_tensor(key)
            if read.per_kv_head:
                heads = factors.view(self.geometry.kv_heads, -1, self.geometry.head_dim)
                factors = heads[:, 0].flatten()
            made = slice(read.first_row, read.first_row + len(factors))
            weight = module.get_parameter(f"{read.source}.weight")
            weight.data[made] = (weight[made].float() * factors.unsqueeze(1)).to(weight.dtype)

    def _round(
        self, index: int, layer: nn.Module, seen: dict[str, InputStatistics], kv_absmax: Tensor
    ) -> None:
        prefix, dtype = layer_name(index), self.source.dtype
        own = [part for part in self.parts if part.layer == index]
        readers = [reader for part in own for reader in part.readers]
        tensors: dict[str, Tensor] = {_KV_ABSMAX: kv_absmax}
        errors: dict[str, dict[str, float]] = {part.name: {} for part in own}
        for label, preset in self.formats.items():
            made = quantize_layer(
                copy.deepcopy(layer), dict.fromkeys(readers, preset), seen, self.geometry, dtype
            )
            assert made is not None
            for name, (weight, scheme, input_scale) in made.linears.items():
                for kind, tensor in pack_linear(weight, scheme, input_scale).items():
                    tensors[f"{label}/{prefix}.{name}.{kind}"] = tensor.cpu().contiguous()
            for name, factors in made.factors.items():
                tensors[f"{label}/{name}.factors"] = factors.cpu().contiguous()
            for part in own:
                errors[part.name][label] = sum(
                    _output_error(made, reader, made.statistics[part.input])
                    for reader in part.readers
                )
        with new_file(self._codes(index)) as partial:
            save_file(tensors, partial)
        write_atomically(self._errors(index), json.dumps(errors))

    def _codes(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.safetensors"

    def _errors(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.json"


def _output_error(made: QuantizedLayer, name: str, seen: InputStatistics) -> float:
    assert seen.moments is not None
    change = dequantize(made.linears[name].weight, torch.float32) - made.targets[name]
    return float(((change @ seen.moments) * change).sum())


def _divided(factors: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return ((inputs[0].float() / factors).to(inputs[0].dtype),)


@torch.no_grad()
def measure_parts(
    rounded: Rounded, labels: Sequence[str], windows: Tensor
) -> dict[str, dict[str, float]]:
    """KL divergence at the output, in nats per token, that each part causes when it alone has each of the
    formats `labels`: by part and format.

    In 16 bit any change, however small, lets every later layer round otherwise. What that alone causes is
    measured too, and taken off: it would be counted once for every part.
    """
    windows = windows[: max(1, _PART_TOKENS // windows.shape[1])]
    state = windows.numel() * rounded.geometry.hidden * rounded.source.dtype.itemsize
    at_once = max(1, _STREAMS_BYTES // (state * len(labels)))
    found: dict[str, dict[str, float]] = {}
    for first in range(0, len(rounded.parts), at_once):
        found |= _measured(rounded, rounded.parts[first : first + at_once], labels, windows)
    return found


def _measured(
    rounded: Rounded, parts: list[Part], labels: Sequence[str], windows: Tensor
) -> dict[str, dict[str, float]]:
    """One walk over the layers: every part in every format starts a stream of hidden states of its own."""
    walk, geometry = rounded.walk, rounded.geometry
    exact = walk.embed(windows)
    streams: dict[tuple[str, str], Tensor] = {}
    with bar("sensitivity", geometry.layers) as advance:
        for index in range(geometry.layers):
            layer = walk.load(index)
            weights = layer.state_dict()
            for stream in streams.values():
                walk.run(layer, stream, stream, finite=False)
            for part in parts:
                for label in labels if part.layer == index else ():
                    changed = walk.module(index, weights)
                    rounded.install(changed, index, {part.name: label})
                    streams[part.name, label] = walk.run(
                        changed, exact, torch.empty_like(exact), finite=False
                    )
            walk.run(layer, exact, exact)
            if any(part.layer == index for part in parts):
                # half a unit in the last place, up or down: about every second number rounds otherwise
                noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(index))
                off = torch.finfo(exact.dtype).eps * (noise - 0.5)
                streams[layer_name(index), _FLOOR] = (exact.float() * (1 + off)).to(exact.dtype)
            advance(1)
    found = divergences(rounded, exact, list(streams.values()), [{}] * len(streams))
    measured = dict(zip(streams, found, strict=True))
    by_part: dict[str, dict[str, float]] = {}
    for part in parts:
        floor = measured[layer_name(part.layer), _FLOOR]
        by_part[part.name] = {
            label: max(0.0, measured[part.name, label] - floor) for label in labels
        }
    return by_part


@torch.no_grad()
def final_states(rounded: Rounded, choices: Sequence[Choice], windows: Tensor) -> list[Tensor]:
    """The last layer's outputs [n, length, hidden] of whole models, put together from rounded parts."""
    walk = rounded.walk
    streams = [walk.embed(windows, rounded.table(c.get(EMBEDDING_PART))) for c in choices]
    with bar("whole models", rounded.geometry.layers) as advance:
        for index in range(rounded.geometry.layers):
            weights = walk.load(index).state_dict()
            for choice, stream in zip(choices, streams, strict=True):
                module = walk.module(index, weights)
                rounded.install(module, index, choice)
                cache = rounded.cache(index, choice.get(KV_PART))
                walk.run(module, stream, stream, cache, finite=False)
            advance(1)
    return streams


def divergences(
    rounded: Rounded, exact: Tensor, streams: list[Tensor], choices: Sequence[Choice]
) -> list[float]:
    """KL(exact ‖ other) of each, in nats per token. exact, streams: last layers' outputs. choices: of each
    stream; a quantized embedding is the head, too, where they are tied."""
    geometry, walk = rounded.geometry, rounded.walk
    norm, head = norm_and_head(rounded.source, walk.device)

    def logits(hidden: Tensor, head: Tensor) -> Tensor:
        return output_logits(hidden, norm, head, geometry.norm_eps, geometry.multipliers.logits)

    def head_of(choice: Choice) -> Tensor:
        table = rounded.table(choice.get(EMBEDDING_PART)) if geometry.tied_head else None
        return head if table is None else dequantize(table, torch.float32)

    kinds = {choice.get(EMBEDDING_PART): head_of(choice) for choice in choices}
    others = [
        (stream, partial(logits, head=kinds[choice.get(EMBEDDING_PART)]))
        for stream, choice in zip(streams, choices, strict=True)
    ]
    found = mean_divergences((exact, partial(logits, head=head)), others, walk.device)
    # a model that overflows is one that nobody wants, and not the end of the search
    return [kl if math.isfinite(kl) else _BROKEN for kl in found]


def predicted_costs(errors: Options, measured: Options) -> dict[str, dict[str, float]]:
    """Divergence of each part in each format, in nats: along its error, between what was measured."""
    costs = {}
    for part, of in errors.items():
        points = sorted([(0.0, 0.0), *((of[label], kl) for label, kl in measured[part].items())])
        at, kls = zip(*points, strict=True)
        costs[part] = {label: float(np.interp(error, at, kls)) for label, error in of.items()}
    return costs


class Found(NamedTuple):
    formats: dict[str, str]
    """By part; in a manifest by full name of each linear layer"""
    kl: float
    """Of the whole, nats per token"""
    predicted: float
    """The sum of what its parts cost alone"""
    tried: int


def search(
    rounded: Rounded,
    costs: Options,
    limits: Sequence[tuple[Options, float]],
    windows: Tensor,
    seed: int,
) -> Found:
    """The formats within the limits whose whole diverges least, of those that were tried.

    costs, limits: of `allocate`. windows: [n, length], on which the whole is measured.
    """
    generator = np.random.default_rng(seed)
    (exact,) = final_states(rounded, [{}], windows)
    labels = {label for options in costs.values() for label in options}
    best: tuple[dict[str, str], float] | None = None
    # logarithms of what the costs of a part, or of a format, are multiplied with
    around, spread = dict.fromkeys([*costs, *sorted(labels)], 0.0), _SPREAD
    seen: set[tuple[str, ...]] = set()
    for turn in range(_ROUNDS):
        tried = []
        for number in range(_AT_ONCE):
            point = around
            if turn or number:
                point = {key: x + generator.normal(0, spread) for key, x in around.items()}
            formats = allocate(_varied(costs, point), limits)
            if tuple(formats.values()) not in seen:
                seen.add(tuple(formats.values()))
                tried.append((formats, point))
        if not tried:
            continue
        chosen = [formats for formats, _ in tried]
        states = final_states(rounded, chosen, windows)
        found = divergences(rounded, exact, states, chosen)
        for (formats, point), kl in zip(tried, found, strict=True):
            if best is None or kl < best[1]:
                best, around = (formats, kl), point
        spread *= _COOLING
    assert best is not None
    formats, kl = best
    predicted = sum(costs[part][label] for part, label in formats.items())
    say(f"mixed: {len(seen)} models tried, KL {kl:.4f} nats (of the parts alone: {predicted:.4f})")
    return Found(formats, kl, predicted, len(seen))


def _varied(costs: Options, point: Mapping[str, float]) -> Options:
    return {
        part: {
            label: cost * float(np.exp(point[part] + point[label]))
            for label, cost in options.items()
        }
        for part, options in costs.items()
    }


def mix(
    source: Checkpoint, walk: DecoderWalk, plan: QuantizePlan, windows: Tensor, folder: Path
) -> Found:
    """The formats of a plan with `bits`. windows: of calibration; the last ones are kept for measuring.
    folder: for rounded parts; what a run that was stopped left there is used."""
    geometry = geometry_of(source)
    presets = chosen_presets(geometry, plan, dtype=source.dtype)
    left = frozenset(linear_names(geometry)) - presets.keys()
    formats = {
        # factors would be folded into layers that other formats share
        label: replace(preset, algorithm=replace(preset.algorithm, equalize="none"))
        for label, preset in mixed_formats(geometry, plan).items()
    }
    kept = min(len(windows) // 4, -(-_WHOLE_TOKENS // windows.shape[1]))
    calibration, measured = (windows[:-kept], windows[-kept:]) if kept else (windows, windows)
    rounded = Rounded(source, walk, formats, parts_of(geometry, left), folder)
    rounded.make(calibration)
    measures = measure_parts(rounded, one_each(formats), measured)
    costs = predicted_costs(rounded.errors(), measures)
    shapes = [geometry.linears[reader] for part in rounded.parts for reader in part.readers]
    weights = sum(rows * columns for rows, columns in shapes)
    assert plan.bits is not None
    found = search(
        rounded, costs, [(part_bytes(rounded), plan.bits * weights / 8)], measured, plan.seed
    )
    by_layer = {name: found.formats[part.name] for part in rounded.parts for name in part.members}
    return found._replace(formats=by_layer)


def part_bytes(rounded: Rounded) -> dict[str, dict[str, float]]:
    """As stored, by part and format."""
    linears, dtype = rounded.geometry.linears, rounded.source.dtype

    def size(part: Part, scheme: Scheme) -> float:
        return float(sum(stored_bytes(scheme, linears[reader], dtype) for reader in part.readers))

    return {
        part.name: {label: size(part, p.scheme) for label, p in rounded.formats.items()}
        for part in rounded.parts
    }


def one_each(formats: Mapping[str, Preset]) -> list[str]:
    """Of each number of bits the format with the largest groups, whose error is the largest, up to the 4
    bits whose divergence is well above chance; if there is none, all."""
    coarsest: dict[int, str] = {}
    sizes = {label: p.scheme.weights.group_size or 1 << 30 for label, p in formats.items()}
    for label in sorted(formats, key=lambda label: -sizes[label]):
        coarsest.setdefault(formats[label].scheme.weights.bits, label)
    few = [label for bits, label in sorted(coarsest.items()) if bits <= 4]
    return few or list(formats)
