"""How long a model takes before it is made: each part's milliseconds, measured on this device, added up.

Start at `SpeedTable.measure`, then `SpeedTable.of`. The engine serves small models of noise under the
stated load: some layers, all in 16 bit, then with one part in another format (on a CPU, all parts). The
difference is what the part gains or loses in that format. The same is done at smaller widths; between
them, time is linear in the part's parameters.
"""

import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinier.benchmark import Workload
from tinier.benchmark.speed import engine_for, random_prompts
from tinier.checkpoint import Checkpoint, check_disk, copy_side_files, pack_linear, write_atomically
from tinier.checkpoint.folder import TensorInfo, read_header
from tinier.device import release_memory
from tinier.engine import Engine, Request, SamplingParams
from tinier.families import (
    EMBEDDING,
    EMBEDDING_MODULE,
    FINAL_NORM,
    HEAD,
    HEAD_LINEAR,
    Geometry,
    geometry_of,
    layer_name,
)
from tinier.kernels.linear import linear_path
from tinier.kernels.machine import machine_of
from tinier.progress import bar
from tinier.pruning import Sizes
from tinier.pruning.importance import cut_to
from tinier.pruning.plan import resized
from tinier.quantization.mixed import (
    EMBEDDING_FORMATS,
    EMBEDDING_PART,
    KV_FORMATS,
    KV_PART,
    Choice,
)
from tinier.quantization.plan import (
    SIXTEEN_BIT,
    embedding_preset,
    kv_grid,
    output_config,
    table_group,
)
from tinier.quantization.scales import absmax_scales, round_nearest, round_table
from tinier.schemes import Int4Inputs, Layout, Preset, Scheme

_STEPS, _WARM_UP = 24, 4
_REPEATS = 3
# bytes of a small model's layers in 16 bit, if the model has as many: more than a CPU's caches hold, and
# on a GPU what takes longer to read than Python to launch
_BYTES = {"cpu": 1e9, "cuda": 3e9}
# tokens of a small model's vocabulary: its head should cost nothing
_VOCABULARY = 1024


class Times(NamedTuple):
    """Milliseconds under the load: of all prompts together, and of one decode step."""

    prompt: float
    step: float

    def __add__(self, other: object) -> "Times":
        assert isinstance(other, Times)
        return Times(self.prompt + other.prompt, self.step + other.step)

    def times(self, factor: float) -> "Times":
        return Times(self.prompt * factor, self.step * factor)

    def over(self, load: Workload) -> float:
        """Of the whole load."""
        return self.prompt + (load.output_length - 1) * self.step


NOTHING = Times(0.0, 0.0)


def between(points: Mapping[float, Times], x: float) -> Times:
    """Times at `x` on the lines through points; outside of them on the nearest line."""
    xs = sorted(points)
    if len(xs) == 1:
        return points[xs[0]]
    right = next((i for i in range(1, len(xs)) if x <= xs[i]), len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    share = (x - low) / (high - low)
    return points[low].times(1 - share) + points[high].times(share)


class SpeedTable:
    """Times of this engine on this device, under one load."""

    def __init__(
        self, geometry: Geometry, sizes: Sequence[Sizes], measured: dict[str, Times],
        layers: dict[str, int], labels: frozenset[str],
    ) -> None:  # fmt: skip
        """sizes: widths that were measured, the model's own last. measured: by the names of
        `SmallModels.all`. layers: of the small models of each size. labels: formats that take other times
        than 16 bit."""
        self._geometry = geometry
        self._sizes = sizes
        self._measured = measured
        self._layers = layers
        self._labels = labels

    @classmethod
    def measure(
        cls, source: Checkpoint, formats: Mapping[str, Preset], sizes: Sequence[Sizes], load: Workload,
        path: Path, device: torch.device, int4_inputs: Int4Inputs,
    ) -> "SpeedTable":  # fmt: skip
        """Measure what `path`, a JSON file, does not hold yet.

        formats: by label. sizes: widths to measure, from narrow to the model's own.
        """
        geometry = geometry_of(source)
        formats = timed_formats(source, formats, device)
        layers = {}
        for own in sizes:
            enough = math.ceil(_BYTES[device.type] / (2 * resized(geometry, own).layer_parameters))
            layers[_label(own)] = min(geometry.layers, max(2, enough))
        measured = _read(path)
        folder = path.with_suffix(".models")
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
        small = {
            own: SmallModels(source, own, formats, folder / _label(own), device)
            for own in dict.fromkeys(sizes)
        }
        todo: dict[str, tuple[SmallModels, _Spec]] = {}
        for own, one in small.items():
            # a part alone is less than what a CPU's other work takes from one measurement to the next
            is_whole = own == sizes[-1]
            specs = one.all(
                layers[_label(own)], by_part=is_whole and device.type != "cpu", cache=is_whole,
                embedding=own in (sizes[0], sizes[-1]),
            )  # fmt: skip
            todo |= {name: (one, spec) for name, spec in specs.items() if name not in measured}
        if todo:
            check_disk(path, sum(one.num_bytes for one in small.values()))
            deepest = layers[_label(sizes[-1])]
            clock = Clock(small[sizes[-1]].view([{}] * deepest, {}), load, device, int4_inputs)
            with bar("speed of parts", len(todo)) as advance:
                for name, (one, spec) in todo.items():
                    measured[name] = clock.time(one.view(*spec))
                    write_atomically(path, json.dumps(measured))
                    advance(1)
            del clock
            shutil.rmtree(folder, ignore_errors=True)
        return cls(geometry, sizes, measured, layers, frozenset(formats))

    def layer(self, sizes: Sizes) -> Times:
        """A layer, all in 16 bit."""
        return self._between(sizes, lambda g: g.layer_parameters, self._per_layer)

    def edge(self, sizes: Sizes, label: str) -> Times:
        """What is not in a layer: embedding, final norm, head, and what a step costs at all."""

        def measured(own: str) -> Times | None:
            found = self._measured.get(f"{own}/{EMBEDDING_PART}={label}")
            return found and found + self._per_layer(own).times(-self._layers[own])

        return self._between(sizes, lambda g: g.vocab * g.hidden, measured)

    def part(self, sizes: Sizes, name: str, label: str) -> Times:
        """What one part (Input.name, or the KV cache) of a layer gains or loses against 16 bit."""
        if label == SIXTEEN_BIT or (name != KV_PART and label not in self._labels):
            return NOTHING
        if name == KV_PART:
            whole = self._difference(_label(self._sizes[-1]), f"{name}={label}")
            return whole.times(sizes.kv_heads / self._geometry.kv_heads)
        readers = {read.name: read.readers for read in self._geometry.inputs}

        def parameters(g: Geometry) -> float:
            return float(sum(g.linears[r][0] * g.linears[r][1] for r in readers[name]))

        def share(g: Geometry) -> float:
            every = sum(g.linears[r][0] * g.linears[r][1] for rs in readers.values() for r in rs)
            return parameters(g) / every

        def measured(own: str) -> Times:
            if f"{own}/{name}={label}" not in self._measured:
                whole = resized(self._geometry, next(s for s in self._sizes if _label(s) == own))
                return self._difference(own, f"all={label}").times(share(whole))
            alone = self._difference(own, f"{name}={label}")
            # what all parts together gain is one measurement more
            parts = [self._difference(own, f"{other}={label}") for other in readers]
            rest = self._difference(own, f"all={label}")
            for one in parts:
                rest = rest + one.times(-1)
            return alone + rest.times(1 / (len(parts) + 1))

        return self._between(sizes, parameters, measured)

    def of(self, sizes: Sizes, layers: list[Choice], ends: Choice) -> Times:
        """A whole model. layers: the format by Input.name of each; ends: of embedding and KV cache."""
        total = self.edge(sizes, ends.get(EMBEDDING_PART, SIXTEEN_BIT))
        cache = self.part(sizes, KV_PART, ends.get(KV_PART, SIXTEEN_BIT))
        for choice in layers:
            total = total + self.layer(sizes) + cache
            for name, label in choice.items():
                total = total + self.part(sizes, name, label)
        return total

    def _difference(self, own: str, what: str) -> Times:
        """Of one layer, with and without."""
        found = self._measured[f"{own}/{what}"] + self._measured[f"{own}/plain"].times(-1)
        return found.times(1 / self._layers[own])

    def _per_layer(self, own: str) -> Times:
        fewer = self._layers[own] // 2
        found = self._measured[f"{own}/plain"] + self._measured[f"{own}/half"].times(-1)
        return found.times(1 / (self._layers[own] - fewer))

    def _between(
        self,
        sizes: Sizes,
        parameters: Callable[[Geometry], float],
        measured: Callable[[str], Times | None],
    ) -> Times:
        points = {
            float(parameters(resized(self._geometry, own))): times
            for own in self._sizes
            if (times := measured(_label(own))) is not None
        }
        return between(points, float(parameters(resized(self._geometry, sizes))))


def _label(sizes: Sizes) -> str:
    return f"{sizes.hidden}x{sizes.intermediate}x{sizes.heads}"


def _read(path: Path) -> dict[str, Times]:
    try:
        return {name: Times(*pair) for name, pair in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError):
        return {}


def timed_formats(
    source: Checkpoint, formats: Mapping[str, Preset], device: torch.device
) -> dict[str, Preset]:
    """Those that take other times than 16 bit: weights that are expanded to it at load do not."""
    machine, shapes = machine_of(device), geometry_of(source).linears.values()
    return {
        label: preset
        for label, preset in formats.items()
        if preset.scheme.activations is not None
        or any(linear_path(preset.scheme, s, source.dtype, machine) != "expanded" for s in shapes)
    }


_Spec = tuple[Sequence[Choice], Choice]
"""What `SmallModels.view` takes"""


class SmallModels:
    """Checkpoints of noise of one width, which all read the same files: a layer in every format."""

    def __init__(
        self, source: Checkpoint, sizes: Sizes, formats: Mapping[str, Preset], folder: Path,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._source, self._sizes, self._formats, self._folder = source, sizes, formats, folder
        self._device = device
        self._whole = resized(geometry_of(source), sizes)

    @property
    def num_bytes(self) -> int:
        """About what the files take."""
        edges = 3 * self._whole.vocab * self._whole.hidden
        layers = (1 + len(self._formats)) * self._whole.layer_parameters
        return (edges + layers) * self._source.dtype.itemsize

    def all(self, layers: int, *, by_part: bool, cache: bool, embedding: bool) -> dict[str, _Spec]:
        """What is measured, by name, as `view` takes it. by_part: each part alone, too. cache, embedding:
        the formats of these."""
        own, names = _label(self._sizes), [read.name for read in self._whole.inputs]
        plain: list[Choice] = [{}] * layers
        found: dict[str, _Spec] = {
            f"{own}/plain": (plain, {}),
            f"{own}/half": (plain[: layers // 2], {}),
        }
        for label in self._formats:
            found[f"{own}/all={label}"] = [dict.fromkeys(names, label)] * layers, {}
            for name in names if by_part else ():
                found[f"{own}/{name}={label}"] = [{name: label}] * layers, {}
        for label in KV_FORMATS if cache else ():
            found[f"{own}/{KV_PART}={label}"] = plain, {KV_PART: label}
        for label in (SIXTEEN_BIT, *EMBEDDING_FORMATS) if embedding else ():
            found[f"{own}/{EMBEDDING_PART}={label}"] = plain, {EMBEDDING_PART: label}
        return found

    @cached_property
    def _tensors(self) -> dict[str, dict[str, TensorInfo]]:
        """The files' tensors, written when the first model is asked for."""
        self._folder.mkdir(parents=True)
        copy_side_files(self._source, self._folder)
        generator = torch.Generator(self._device).manual_seed(0)
        dtype = self._source.dtype
        geometry = self._whole

        def noise(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator, device=self._device)
            return made.mul_(0.02).to(dtype)

        files: dict[str, dict[str, Tensor]] = {}
        weights = {name: noise(*shape) for name, shape in geometry.linears.items()}
        files[SIXTEEN_BIT] = {f"{name}.weight": weight for name, weight in weights.items()}
        for label, preset in self._formats.items():
            files[label] = {}
            for name, weight in weights.items():
                files[label] |= _packed(name, weight, preset.scheme, dtype)
        files["others"] = {
            name: torch.ones(shape, dtype=dtype)
            for name, shape in (geometry.norms | geometry.biases).items()
        }
        files["others"] |= {
            f"self_attn.{n}_scale": torch.full((1,), 0.05, dtype=dtype) for n in "kv"
        }
        for vocab in (_VOCABULARY, geometry.vocab):
            table = noise(vocab, geometry.hidden)
            files[f"ends-{vocab}"] = {EMBEDDING: table, HEAD: table.clone()}
        files["norm"] = {FINAL_NORM: torch.ones(geometry.hidden, dtype=dtype)}
        for label in EMBEDDING_FORMATS:
            grid = embedding_preset(label, table_group(geometry)).scheme
            codes = round_table(table, grid.weights, dtype)
            made = {f"{EMBEDDING_MODULE}.{k}": t for k, t in pack_linear(codes, grid).items()}
            if grid.weights.bits == 8:
                made[f"{HEAD_LINEAR}.weight_scale"] = codes.scale.clone()
            files[f"table-{label}"] = made
        found = {}
        for name, tensors in files.items():
            path = self._folder / f"{name.replace(':', '-')}.safetensors"
            save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, path)
            found[name] = read_header(path)
        return found

    def view(self, layers: Sequence[Choice], ends: Choice) -> Checkpoint:
        """A checkpoint whose layers are all the same numbers. layers: the formats of each, by Input.name.
        ends: of embedding and KV cache; without an embedding the vocabulary is small."""
        geometry = self._whole
        embedding, kv = ends.get(EMBEDDING_PART), ends.get(KV_PART)
        vocab = _VOCABULARY if embedding is None else geometry.vocab
        tensors = dict(self._tensors["norm"])
        schemes: dict[str, Scheme] = {}
        if embedding in (None, SIXTEEN_BIT):
            table = self._tensors[f"ends-{vocab}"]
            tensors |= {EMBEDDING: table[EMBEDDING]}
        else:
            assert embedding is not None
            tensors |= self._tensors[f"table-{embedding}"]
            scheme = embedding_preset(embedding, table_group(geometry)).scheme
            schemes[EMBEDDING_MODULE] = scheme
            if geometry.tied_head:
                schemes[HEAD_LINEAR] = scheme
        if not geometry.tied_head:
            tensors.pop(f"{HEAD_LINEAR}.weight_scale", None)
            tensors[HEAD] = self._tensors[f"ends-{vocab}"][HEAD]
        for index, parts in enumerate(layers):
            prefix = layer_name(index)
            for name, info in self._tensors["others"].items():
                if kv or not name.endswith(("k_scale", "v_scale")):
                    tensors[f"{prefix}.{name}"] = info
            for read in geometry.inputs:
                label = parts.get(read.name, SIXTEEN_BIT)
                for reader in read.readers:
                    for name, info in self._tensors[label].items():
                        if name.startswith(f"{reader}."):
                            tensors[f"{prefix}.{name}"] = info
                    if label != SIXTEEN_BIT:
                        schemes[f"{prefix}.{reader}"] = self._formats[label].scheme
        own = geometry_of(self._source)
        sizes = replace(self._sizes, layers=len(layers))
        cut = cut_to(own, sizes, tuple(range(len(layers))), None)
        ids = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
        config = cut.config(self._source.config, own) | {"vocab_size": vocab} | ids
        plain = replace(
            self._source, folder=self._folder, config=config, tensors=tensors, manifest=None
        )
        layout = Layout(schemes=schemes, kv_cache=kv_grid(kv))
        return replace(plain, config=output_config(plain, layout))


def _packed(name: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = round_nearest(weight, absmax_scales(weight, scheme.weights, dtype), scheme.weights)
    return {f"{name}.{kind}": tensor for kind, tensor in pack_linear(codes, scheme).items()}


class Clock:
    """Times small models, each by turns with one that stays: what else the machine does slows both."""

    def __init__(
        self, reference: Checkpoint, load: Workload, device: torch.device, int4_inputs: Int4Inputs
    ) -> None:
        self._load, self._device, self._int4_inputs = load, device, int4_inputs
        steps = min(load.output_length, _STEPS)
        # steps are measured in the middle of the answers, where the cache is as long as on average
        middle = load.input_length + (load.output_length - steps) // 2
        self._middle = replace(load, input_length=middle, output_length=steps)
        self._engine = self._open(reference)
        self._once(self._engine)
        found = [self._once(self._engine) for _ in range(_REPEATS)]
        self.usual = Times(*(statistics.median(times) for times in zip(*found, strict=True)))
        """Of the model that stays"""

    def time(self, view: Checkpoint) -> Times:
        """Of another, at the speed that the first had at the beginning."""
        engine = self._open(view)
        self._once(engine)
        ratios = []
        for _ in range(_REPEATS):
            there, here = self._once(self._engine), self._once(engine)
            ratios.append([own / other for own, other in zip(here, there, strict=True)])
        del engine
        release_memory()
        middle = (statistics.median(ratio) for ratio in zip(*ratios, strict=True))
        return Times(*(r * usual for r, usual in zip(middle, self.usual, strict=True)))

    def _open(self, view: Checkpoint) -> Engine:
        # they say what has no fast path: here that is what is to be found out
        logger = logging.getLogger("tinier")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return Engine(view, engine_for(self._middle, str(self._device), 1, self._int4_inputs))
        finally:
            logger.setLevel(before)

    def _once(self, engine: Engine) -> Times:
        prompts = self._run(engine, replace(self._load, output_length=2))
        start = max(r.token_times[0] for r in prompts) - min(r.arrived for r in prompts)
        last = self._run(engine, self._middle)[-1]
        times = last.token_times[min(_WARM_UP, len(last.token_times) - 2) :]
        step = statistics.median(after - before for before, after in pairwise(times))
        return Times(1e3 * start, 1e3 * step)

    def _run(self, engine: Engine, workload: Workload) -> list[Request]:
        params = SamplingParams(max_tokens=workload.output_length, stop_token_ids=())
        requests = [engine.add(prompt, params) for prompt in random_prompts(engine, workload, 0)]
        while engine.has_work:
            engine.step()
        return requests
