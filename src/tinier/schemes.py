"""How numbers are stored (`Scheme`), and the names users give to the usual choices (`PRESETS`).

A scheme says nothing about how the codes are chosen: that is the `Algorithm`, named beside it in a
preset. Nothing edits a scheme after construction; use `dataclasses.replace`.
"""

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tinier.errors import SchemeError
from tinier.numerics import E2M1_MAX, E4M3_MAX, int_range

EMBEDDING_MODULE = "model.embed_tokens"
HEAD_LINEAR = "lm_head"
ScaleFormat = Literal["model", "e4m3", "e8m0"]
Storage = Literal["compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "modelopt"]
"""Whose tensors a quantized checkpoint has (checkpoint/formats.py)"""
Int4Inputs = Literal["int8", "16bit"]
"""What the inputs of INT4 weights, and of a head that is an INT8 embedding, are multiplied as on a CPU.
int8: rounded to 8 bits with a scale for each 32 inputs, in integers, which is faster, and not quite what
the checkpoint says"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The grid that the numbers of one tensor are rounded to."""

    kind: Literal["int", "float", "e5m2"]
    """`int`: evenly spaced codes. `float`: E4M3 at 8 bits, E2M1 at 4. `e5m2`: that, at 8 bits; in a
    checkpoint only the type of the stored codes tells it from E4M3."""
    bits: Literal[2, 3, 4, 8]
    """Width of one stored code."""
    granularity: Literal["tensor", "channel", "group", "block", "token"]
    """What shares one scale: all, an output channel, a group of input columns, a square block, or
    a token's row. For activations `tensor` is static (calibrated), `token` and `group` dynamic."""
    group_size: int | None = None
    """Columns that share one scale, or the side of the block."""
    symmetric: bool = True
    """False: every scale has a zero point beside it (integers only)."""
    scale_format: ScaleFormat = "model"
    """How scales are stored: in the model's 16-bit type, E4M3 under one float32 scale for the
    tensor (NVFP4), or powers of two (MXFP4)."""

    def __post_init__(self) -> None:
        if (self.granularity in ("group", "block")) != (self.group_size is not None):
            raise SchemeError(
                f"granularity {self.granularity!r} with group_size={self.group_size}. "
                "A group size goes with granularity 'group' or 'block' and with no other."
            )
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size={self.group_size}. Use a positive number, such as 64.")
        widths = {"int": (2, 3, 4, 8), "float": (4, 8), "e5m2": (8,)}[self.kind]
        if self.bits not in widths:
            raise SchemeError(
                f"bits={self.bits} with kind {self.kind!r}. Use {' or '.join(map(str, widths))}."
            )
        if self.kind != "int" and not self.symmetric:
            raise SchemeError(
                f"symmetric=False with kind {self.kind!r}. Zero points go with kind 'int' alone."
            )
        if self.scale_format != "model" and (self.kind, self.bits) != ("float", 4):
            raise SchemeError(f"{self.scale_format} scales go with 4-bit floats only.")

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code."""
        if self.kind != "int":
            # E5M2 reaches farther than 448; kept there, its codes survive a cast to E4M3
            largest = E4M3_MAX if self.bits == 8 else E2M1_MAX
            return -largest, largest
        lowest, highest = int_range(self.bits)
        return float(lowest), float(highest)

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(R, C): a weight of `shape` [out, in] has R · C scales, each over out/R × in/C weights."""
        rows, columns = shape
        size = self.group_size or 1
        return {
            "tensor": (1, 1),
            "channel": (rows, 1),
            "group": (rows, columns // size),
            "block": (rows // size, columns // size),
        }[self.granularity]

    @property
    def label(self) -> str:
        """Such as `INT4 g64`, `INT4 g64 asym`, `NVFP4`, `FP8`."""
        if self.scale_format != "model":
            return {"e4m3": "NVFP4", "e8m0": "MXFP4"}[self.scale_format]
        name = {"int": f"INT{self.bits}", "float": f"FP{self.bits}", "e5m2": "FP8(E5M2)"}[self.kind]
        group = f" {self.granularity[0]}{self.group_size}" if self.group_size else ""
        return name + group + ("" if self.symmetric else " asym")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    weights: Grid
    """How the weights of a linear layer are stored."""
    activations: Grid | None = None
    """How its inputs are rounded while it runs; None leaves them in 16 bit."""

    @property
    def label(self) -> str:
        """Short name for tables, such as `FP8 W8A8` or `INT4 W4A16 g64`."""
        grid = self.weights
        bits = self.activations.bits if self.activations else 16
        name, *rest = grid.label.split(" ")
        kind = "" if self.activations is None or self.activations.kind == grid.kind else "-FP8"
        return " ".join([name, f"W{grid.bits}A{bits}{kind}", *rest])

    @property
    def static_activations(self) -> bool:
        """Whether the inputs have one calibrated scale."""
        return self.activations is not None and self.activations.granularity == "tensor"

    @property
    def input_scale_name(self) -> str | None:
        """What a checkpoint calls the calibrated number of the inputs: their scale, or for NVFP4 what
        their scales are divided by; None where nothing is calibrated."""
        if self.static_activations:
            return "input_scale"
        if self.activations is not None and self.activations.scale_format == "e4m3":
            return "input_global_scale"
        return None

    def check_fits(self, name: str, shape: tuple[int, int]) -> None:
        """Raise SchemeError unless a linear layer of `shape` [out, in] can be stored so."""
        for grid in (self.weights, self.activations):
            size = grid.group_size if grid else None
            rows, columns = shape
            if size is None or grid is None:
                continue
            if columns % size == 0 and (grid.granularity != "block" or rows % size == 0):
                continue
            fitting = [
                d for d in (16, 32, 64, 128, 256)
                if columns % d == 0 and (grid.granularity != "block" or rows % d == 0)
            ]  # fmt: skip
            raise SchemeError(
                f"group size {size} does not divide the {columns} input columns"
                f"{f' and {rows} rows' if grid.granularity == 'block' else ''} of {name}. "
                f"Sizes that do: {', '.join(map(str, fitting)) or 'none of the usual ones'}. "
                f"Use --group-size, or leave the layer in 16 bit: --ignore '{name}'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a whole checkpoint is stored."""

    schemes: dict[str, Scheme]
    """By name of the linear layer, `lm_head` included, or of the embedding, `model.embed_tokens`; what is
    not in it is in 16 bit. A tied head has the embedding's weights."""
    kv_cache: Grid | None = None
    """How keys and values are rounded when they are cached: 8 bits, one static scale for the keys
    and one for the values of each layer."""
    storage: Storage = "compressed-tensors"

    @property
    def label(self) -> str:
        """Such as `INT4 W4A16 g64`; several schemes with `+`, the most frequent one first."""
        ends = {EMBEDDING_MODULE: "embedding", HEAD_LINEAR: "head"}
        counted = Counter(s.label for n, s in self.schemes.items() if n not in ends)
        parts = [" + ".join(label for label, _ in counted.most_common()) or "16 bit"]
        if len(counted) > 2:
            bits = sorted({s.weights.bits for n, s in self.schemes.items() if n not in ends})
            parts = [f"mixed, {len(counted)} formats of {bits[0]} to {bits[-1]} bits"]
        quantized = {n: self.schemes[m].weights.label for m, n in ends.items() if m in self.schemes}
        if len(quantized) == 2 and len(set(quantized.values())) == 1:
            parts.append(f"{quantized['head']} embedding and head")
        else:
            parts += [f"{label} {name}" for name, label in quantized.items()]
        if self.kv_cache:
            parts.append(f"{self.kv_cache.label} KV")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """How the codes are chosen, step by step; each step is a file of tinier/quantization."""

    equalize: Literal["none", "smoothquant", "awq"] = "none"
    """Per-channel factors moved from a layer's inputs into its weights, exactly, beforehand."""
    scales: Literal["absmax", "error"] = "absmax"
    """Each scale from the largest weight it covers, or searched for the least weighted error."""
    rounding: Literal["nearest", "gptq", "learned"] = "nearest"
    """Nearest code; the code that makes up for the errors before it; or learned, layer by layer."""

    @property
    def needs_data(self) -> bool:
        """Whether it looks at what flows into the layers."""
        return self.equalize != "none" or self.rounding != "nearest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    scheme: Scheme
    algorithm: Algorithm

    @property
    def needs_data(self) -> bool:
        """Whether it needs calibration text."""
        return self.algorithm.needs_data or self.scheme.static_activations


_INT8_TOKEN = Grid(kind="int", bits=8, granularity="token")
_FP8_TOKEN = Grid(kind="float", bits=8, granularity="token")
_FP8_CHANNEL = Grid(kind="float", bits=8, granularity="channel")
_FP8_TENSOR = Grid(kind="float", bits=8, granularity="tensor")
_INT8_CHANNEL = Grid(kind="int", bits=8, granularity="channel")
_INT4 = Grid(kind="int", bits=4, granularity="group", group_size=128)
_NVFP4 = Grid(kind="float", bits=4, granularity="group", group_size=16, scale_format="e4m3")
_MXFP4 = Grid(kind="float", bits=4, granularity="group", group_size=32, scale_format="e8m0")
_GPTQ = Algorithm(scales="error", rounding="gptq")
_AWQ_GPTQ = Algorithm(equalize="awq", scales="error", rounding="gptq")
_SMOOTH_GPTQ = Algorithm(equalize="smoothquant", scales="error", rounding="gptq")

PRESETS: dict[str, Preset] = {
    "fp8": Preset(
        scheme=Scheme(weights=_FP8_CHANNEL, activations=_FP8_TOKEN),
        algorithm=Algorithm(scales="error"),
    ),
    "fp8-gptq": Preset(
        scheme=Scheme(weights=_FP8_CHANNEL, activations=_FP8_TOKEN),
        algorithm=_GPTQ,
    ),
    "fp8-static": Preset(
        scheme=Scheme(weights=_FP8_TENSOR, activations=_FP8_TENSOR),
        algorithm=_GPTQ,
    ),
    "fp8-block": Preset(
        scheme=Scheme(
            weights=Grid(kind="float", bits=8, granularity="block", group_size=128),
            activations=Grid(kind="float", bits=8, granularity="group", group_size=128),
        ),
        algorithm=Algorithm(scales="error"),
    ),
    "fp8-e5m2": Preset(
        scheme=Scheme(weights=Grid(kind="e5m2", bits=8, granularity="channel")),
        algorithm=Algorithm(scales="error"),
    ),
    "int8": Preset(
        scheme=Scheme(weights=_INT8_CHANNEL, activations=_INT8_TOKEN),
        algorithm=Algorithm(),
    ),
    "int8-sq": Preset(
        scheme=Scheme(weights=_INT8_CHANNEL, activations=_INT8_TOKEN),
        algorithm=_SMOOTH_GPTQ,
    ),
    "int8-w8a16": Preset(
        scheme=Scheme(weights=_INT8_CHANNEL),
        algorithm=_GPTQ,
    ),
    "int4": Preset(
        scheme=Scheme(weights=_INT4),
        algorithm=Algorithm(scales="error"),
    ),
    "int4-awq": Preset(
        scheme=Scheme(weights=_INT4),
        algorithm=Algorithm(equalize="awq", scales="error"),
    ),
    "int4-gptq": Preset(
        scheme=Scheme(weights=_INT4),
        algorithm=_GPTQ,
    ),
    "int4-best": Preset(
        scheme=Scheme(weights=_INT4),
        algorithm=Algorithm(scales="error", rounding="learned"),
    ),
    "w4a8": Preset(
        scheme=Scheme(weights=_INT4, activations=_FP8_TOKEN),
        algorithm=_AWQ_GPTQ,
    ),
    "w4a8-int8": Preset(
        scheme=Scheme(weights=_INT4, activations=_INT8_TOKEN),
        algorithm=_AWQ_GPTQ,
    ),
    "nvfp4": Preset(
        scheme=Scheme(weights=_NVFP4, activations=_NVFP4),
        algorithm=_SMOOTH_GPTQ,
    ),
    "nvfp4-w4a16": Preset(
        scheme=Scheme(weights=_NVFP4),
        algorithm=_GPTQ,
    ),
    "mxfp4": Preset(
        scheme=Scheme(weights=_MXFP4, activations=_MXFP4),
        algorithm=_SMOOTH_GPTQ,
    ),
    "mxfp4-w4a16": Preset(
        scheme=Scheme(weights=_MXFP4),
        algorithm=_GPTQ,
    ),
    "int3": Preset(
        scheme=Scheme(weights=replace(_INT4, bits=3)),
        algorithm=_AWQ_GPTQ,
    ),
    "int3-best": Preset(
        scheme=Scheme(weights=replace(_INT4, bits=3)),
        algorithm=replace(_AWQ_GPTQ, rounding="learned"),
    ),
    "int2": Preset(
        scheme=Scheme(weights=replace(_INT4, bits=2)),
        algorithm=_AWQ_GPTQ,
    ),
}


def preset_named(
    name: str, group_size: int | None = None, *, symmetric: bool | None = None
) -> Preset:
    """The preset called `name`, with another group size or symmetry if one is given.

    Raises SchemeError for an unknown name, a group size where the preset has no groups or a fixed
    one, or zero points where it has no integers in groups.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SchemeError(f"preset {name!r} is not known. Presets: {', '.join(PRESETS)}.{hint}")
    preset = PRESETS[name]
    weights, activations = preset.scheme.weights, preset.scheme.activations
    if group_size is not None:
        if not _sizes(weights):
            fitting = _names(lambda s: _sizes(s.weights))
            raise SchemeError(
                f"preset {name!r} takes no group size. Presets that do: {fitting}. "
                "Leave --group-size out."
            )
        weights = replace(weights, group_size=group_size)
        if activations and activations.group_size:
            activations = replace(activations, group_size=group_size)
    if symmetric is not None and symmetric != weights.symmetric:
        if not _zero_points(preset.scheme):
            raise SchemeError(
                f"preset {name!r} has no zero points. Presets that can: {_names(_zero_points)}. "
                "Leave --asymmetric out."
            )
        weights = replace(weights, symmetric=symmetric)
    return replace(preset, scheme=Scheme(weights=weights, activations=activations))


def _sizes(grid: Grid) -> bool:
    """Whether another group size makes the same kind of grid."""
    return grid.group_size is not None and grid.scale_format == "model"


def _zero_points(scheme: Scheme) -> bool:
    """Whether the weights may have zero points."""
    grouped = scheme.weights.kind == "int" and scheme.weights.granularity == "group"
    return grouped and scheme.activations is None


def _names(wanted: Callable[[Scheme], bool]) -> str:
    return ", ".join(name for name, preset in PRESETS.items() if wanted(preset.scheme))
