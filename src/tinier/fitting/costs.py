"""What each choice costs in divergence, bytes and milliseconds, and the choice that costs least.

Start at `Costs.solve`. A design is sizes, which layers are left, and the format of every part of them, of
the embedding and of the KV cache. All its figures are sums over parts, so that for given sizes the formats
that lose least within all limits are the solution of a small integer program
(`quantization/allocation.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tinier.benchmark import Workload
from tinier.checkpoint import Checkpoint
from tinier.errors import InputError, SchemeError
from tinier.families import Geometry, geometry_of
from tinier.fitting.budget import Figures, Limits
from tinier.fitting.speed import NOTHING, SpeedTable, Times
from tinier.kernels.linear import linear_path
from tinier.kernels.machine import Machine
from tinier.pruning import Sizes
from tinier.pruning.choice import CutCosts
from tinier.pruning.plan import resized
from tinier.quantization.allocation import Options, allocate
from tinier.quantization.mixed import EMBEDDING_PART, KV_PART, Part, parts_of
from tinier.quantization.plan import SIXTEEN_BIT, embedding_preset, stored_bytes, table_group
from tinier.schemes import Preset

# bytes that a quantized linear layer takes in headers and config.json
_HEADER = 700
# of sizes whose formats are solved for, at most
_SIZES = 24


@dataclass(frozen=True)
class Design:
    """A model that could be made."""

    sizes: Sizes
    dropped: tuple[int, ...]
    """Layers of the base that go"""
    formats: dict[str, str]
    """By part of the base (mixed.Part.name), and of EMBEDDING_PART and KV_PART"""
    steps: int = 0
    """Of healing after pruning"""
    fisher: bool = False
    """Rounded with tokens weighted by the Fisher information, and drift corrected"""
    grid_steps: int = 0
    """Of training on the grid"""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Design":
        return cls(
            **values | {"sizes": Sizes(**values["sizes"]), "dropped": tuple(values["dropped"])}
        )


class _Kind:
    """Of a sum over parts: what every part adds in every format, and what is there anyway."""

    def __init__(self, options: dict[str, dict[str, float]], fixed: float) -> None:
        self.options, self.fixed = options, fixed

    def of(self, formats: Mapping[str, str]) -> float:
        return self.fixed + sum(self.options[part][label] for part, label in formats.items())


@dataclass
class Costs:
    """What is known of a model's parts on one device under one load."""

    source: Checkpoint
    formats: Mapping[str, Preset]
    divergence: Options
    """Nats per token of every part alone, by part of the source and format"""
    cuts: CutCosts | None
    """None: sizes stay as they are"""
    dropped: dict[int, tuple[int, ...]]
    """Which layers go, by how many are left"""
    table: SpeedTable
    machine: Machine
    load: Workload
    possible: list[Sizes]
    """Sizes that may be chosen, the source's among them"""
    healed: float = 0.6
    """Share of a cut's divergence that is left after healing; as measured, once it was"""
    base: Figures | None = None
    """Measured"""
    base_weights: float = 0.0
    """Bytes of the base's weights and KV cache in memory, as measured"""
    _kinds: dict[Sizes, dict[str, _Kind]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.geometry: Geometry = geometry_of(self.source)

    # --- figures

    def lost(self, design: Design) -> float:
        """Divergence from the base, nats per token."""
        return self._of(design.sizes)["divergence"].of(design.formats)

    def predicted(self, design: Design) -> Figures:
        kinds = self._of(design.sizes)
        lost = self.lost(design)
        return Figures(
            size=kinds["size"].of(design.formats),
            memory=kinds["memory"].of(design.formats),
            throughput=self._rate(kinds["milliseconds"].of(design.formats)),
            latency=kinds["step"].of(design.formats),
            quality=math.exp(-lost),
        )

    def _rate(self, milliseconds: float) -> float:
        """Tokens a second in proportion to what the base was measured at; or the milliseconds of a rate."""
        assert self.base is not None
        whole = self._of(Sizes.of(self.geometry))["milliseconds"]
        return self.base.throughput * whole.of(self.untouched.formats) / milliseconds

    @property
    def untouched(self) -> Design:
        """The base model."""
        names = [part.name for part in parts_of(self.geometry)]
        return Design(
            Sizes.of(self.geometry),
            (),
            dict.fromkeys([*names, EMBEDDING_PART, KV_PART], SIXTEEN_BIT),
        )

    def measured_base(self, figures: Figures) -> None:
        """The base's figures, as they are measured by now."""
        self.base = figures
        self._kinds.clear()

    def recovered(self, share: float) -> None:
        """Healing leaves this share of a cut's divergence."""
        self.healed = share
        self._kinds.clear()

    def options(self, sizes: Sizes) -> Options:
        """Divergence of every part in every format."""
        return self._of(sizes)["divergence"].options

    # --- solving

    def solve(
        self, limits: Limits, objective: str = "divergence", *, pruned: bool | None = None
    ) -> Design | None:
        """The design within limits with the least of `objective` (a kind, or `both`: size and time); None
        where there is none. pruned: whether it must be, or must not; None: either."""
        best: tuple[float, Design] | None = None
        whole = Sizes.of(self.geometry)
        for sizes in self._worth_solving():
            if pruned is not None and pruned == (sizes == whole):
                continue
            kinds = self._of(sizes)
            aim = self._aim(kinds, objective)
            if (
                best is not None
                and aim.fixed + sum(min(o.values()) for o in aim.options.values()) >= best[0]
            ):
                continue
            formats = self._formats(sizes, aim.options, limits)
            if formats is None:
                continue
            value = aim.of(formats)
            if best is None or value < best[0]:
                best = value, Design(sizes, self.dropped[sizes.layers], formats)
        return None if best is None else best[1]

    def limited(self, sizes: Sizes, limits: Limits) -> list[tuple[Options, float]] | None:
        """Limits as `allocate` takes them; None where what is there anyway breaks one."""
        kinds, found = self._of(sizes), list[tuple[Options, float]]()
        wanted = {"size": limits.size, "memory": limits.memory, "step": limits.latency}
        if limits.throughput is not None:
            wanted["milliseconds"] = self._rate(limits.throughput)
        if limits.quality is not None:
            wanted["divergence"] = -math.log(limits.quality)
        for name, limit in wanted.items():
            if limit is None:
                continue
            left = limit - kinds[name].fixed
            if left <= 0:
                return None
            found.append((kinds[name].options, left))
        return found

    def _formats(self, sizes: Sizes, aim: Options, limits: Limits) -> dict[str, str] | None:
        limited = self.limited(sizes, limits)
        if limited is None:
            return None
        try:
            return allocate(aim, limited)
        except InputError:
            return None

    def _aim(self, kinds: dict[str, _Kind], objective: str) -> _Kind:
        if objective != "both":
            return kinds[objective]
        whole = self._of(Sizes.of(self.geometry))
        scale = {n: whole[n].of(self.untouched.formats) for n in ("size", "milliseconds")}
        return _Kind(
            {
                part: {
                    label: sum(kinds[n].options[part][label] / scale[n] for n in scale)
                    for label in of
                }
                for part, of in kinds["size"].options.items()
            },
            sum(kinds[n].fixed / scale[n] for n in scale),
        )

    def _worth_solving(self) -> list[Sizes]:
        """The source's sizes, then those that no others beat in divergence and in parameters."""
        whole = Sizes.of(self.geometry)
        if self.cuts is None:
            return [whole]
        ranked = sorted(self.possible, key=self.cuts)
        front, least = list[Sizes](), math.inf
        for sizes in ranked:
            size = resized(self.geometry, sizes).parameters
            if size < least:
                front.append(sizes)
                least = size
        rest = [sizes for sizes in front if sizes != whole]
        step = max(1, math.ceil(len(rest) / _SIZES))
        return [whole, *rest[::step]]

    # --- sums

    def _of(self, sizes: Sizes) -> dict[str, _Kind]:
        if sizes not in self._kinds:
            self._kinds[sizes] = self._sums(sizes)
        return self._kinds[sizes]

    def _sums(self, sizes: Sizes) -> dict[str, _Kind]:
        geometry, dtype = resized(self.geometry, sizes), self.source.dtype
        gone = self.dropped[sizes.layers]
        parts = [part for part in parts_of(self.geometry) if part.layer not in gone]
        per_layer = len(self.geometry.inputs)
        found: dict[str, dict[str, dict[str, float]]] = {
            name: {} for name in ("divergence", "size", "memory", "milliseconds", "step")
        }

        def add(
            part: str, label: str, lost: float, size: float, memory: float, times: Times
        ) -> None:
            for name, value in (
                ("divergence", lost), ("size", size), ("memory", memory),
                ("milliseconds", times.over(self.load)), ("step", times.step),
            ):  # fmt: skip
                found[name].setdefault(part, {})[label] = value

        layer = self.table.layer(sizes).times(1 / per_layer)
        for part in parts:
            for label in (SIXTEEN_BIT, *self.formats):
                size = self._part_bytes(geometry, part, label)
                if size is None:
                    continue
                lost = 0.0 if label == SIXTEEN_BIT else self.divergence[part.name][label]
                times = layer + self.table.part(sizes, part.input, label)
                add(part.name, label, lost, *size, times)
        for label in (SIXTEEN_BIT, *self.divergence[EMBEDDING_PART]):
            size = self._table_bytes(geometry, label)
            lost = self.divergence[EMBEDDING_PART].get(label, 0.0)
            add(EMBEDDING_PART, label, lost, *size, self.table.edge(sizes, label))
        held = self.load.concurrency * (self.load.input_length + self.load.output_length)
        for label in (SIXTEEN_BIT, *self.divergence[KV_PART]):
            item = dtype.itemsize if label == SIXTEEN_BIT else 1
            cache = float(held * geometry.cached_numbers * item)
            times = NOTHING
            if label != SIXTEEN_BIT:
                times = self.table.part(sizes, KV_PART, label).times(sizes.layers)
            add(KV_PART, label, self.divergence[KV_PART].get(label, 0.0), 0.0, cache, times)
        whole = self.source
        side = whole.disk_bytes - whole.weight_bytes
        linear = sum(r * c for r, c in geometry.linears.values())
        edges = geometry.vocab * geometry.hidden * (1 if geometry.tied_head else 2)
        small = geometry.parameters - geometry.layers * linear - edges
        others = float(small * dtype.itemsize)
        cut = 0.0 if self.cuts is None else self.healed * self.cuts(sizes)
        # names, offsets and formats of the tensors: what headers and config.json grow by
        headers = float(_HEADER * sum(len(part.readers) for part in parts))
        others += headers
        fixed = {
            "divergence": cut, "size": side + others, "memory": self._overhead() + others,
            "milliseconds": 0.0, "step": 0.0,
        }  # fmt: skip
        return {name: _Kind(options, fixed[name]) for name, options in found.items()}

    def _overhead(self) -> float:
        """Memory that is neither weights nor cache."""
        return 0.0 if self.base is None else self.base.memory - self.base_weights

    def _part_bytes(self, geometry: Geometry, part: Part, label: str) -> tuple[float, float] | None:
        """On disk and in memory; None for a format that these sizes do not fit."""
        shapes = {reader: geometry.linears[reader] for reader in part.readers}
        dtype = self.source.dtype
        plain = float(sum(r * c for r, c in shapes.values()) * dtype.itemsize)
        if label == SIXTEEN_BIT:
            return plain, plain
        scheme, loaded = self.formats[label].scheme, 0.0
        try:
            for reader, shape in shapes.items():
                scheme.check_fits(reader, shape)
        except SchemeError:
            return None
        stored = float(sum(stored_bytes(scheme, shape, dtype) for shape in shapes.values()))
        for shape in shapes.values():
            expanded = linear_path(scheme, shape, dtype, self.machine) == "expanded"
            loaded += (
                shape[0] * shape[1] * dtype.itemsize
                if expanded
                else stored_bytes(scheme, shape, dtype)
            )
        return stored, loaded

    def _table_bytes(self, geometry: Geometry, label: str) -> tuple[float, float]:
        """Of the embedding, and of the head where it is the same matrix, on disk and in memory."""
        shape, dtype = (geometry.vocab, geometry.hidden), self.source.dtype
        plain = float(shape[0] * shape[1] * dtype.itemsize)
        head = 0.0 if geometry.tied_head else plain
        if label == SIXTEEN_BIT:
            return plain + head, plain + head
        scheme = embedding_preset(label, table_group(geometry)).scheme
        stored = float(stored_bytes(scheme, shape, dtype))
        repeated = (
            shape[0] * dtype.itemsize if geometry.tied_head and scheme.weights.bits == 8 else 0
        )
        return stored + head + repeated, stored + head
