"""What a quantization will do: every check that needs no weights, and its cost.

Start at `plan_quantize`. In: a 16-bit checkpoint, a `QuantizePlan` and, where the algorithm looks at
activations, calibration text. Out: a StagePlan, and the calibration windows that it was made with.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tinier.calibration import check_attention_window
from tinier.calibration.fisher import STATES_BYTES
from tinier.calibration.walk import BATCH_TOKENS
from tinier.checkpoint import Checkpoint, StagePlan, code_digest, quantization_config, stored_shapes
from tinier.errors import InputError, SchemeError
from tinier.families import (
    EMBEDDING_MODULE,
    HEAD_LINEAR,
    Geometry,
    check_length,
    geometry_of,
    layer_name,
    linear_names,
    linear_shape,
    module_names,
)
from tinier.quantization.layer import LayerPresets
from tinier.schemes import Grid, Layout, Preset, Scheme, preset_named
from tinier.text import (
    BUILTIN,
    Document,
    Text,
    documents_of,
    shortfall,
    tensor_sha256,
    token_windows,
)
from tinier.tokenizer import load_tokenizer

NULL = "null"
MIXED, MIXED_BEST = "mixed", "mixed-best"
SIXTEEN_BIT = "16bit"
"""What a layer that is not quantized is called among formats"""
_BEST = "-best"
# 2 to 4 bits, of which `mixed` chooses unless it is told otherwise; and 8
_NARROW = ("int2", "int3", "int4-gptq")
_EMBEDDINGS = ("16bit", "fp8", "int8", "int4")
_PROBE_WINDOWS, _PROBE_LENGTH = 8, 512


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """What to do. The same plan on the same checkpoint and text gives the same bytes."""

    preset: str | None
    """A name of tinier.schemes.PRESETS; `mixed`; `mixed-best`, which learns the rounding of what `mixed`
    chose; or None (`null`): every weight stays in 16 bit."""
    group_size: int | None = None
    """Input columns per scale, for presets that have groups."""
    symmetric: bool | None = None
    """False: with zero points, for integer presets with groups and 16-bit activations."""
    ignore: tuple[str, ...] = ()
    """Patterns (shell style) of layers to leave in 16 bit."""
    head: Literal["fp8", "int8"] | None = None
    """Quantize the head too; a tied one is written beside the embedding, which stays as it is."""
    embedding: Literal["16bit", "fp8", "int8", "int4"] = "16bit"
    """Quantize the embedding: 8 bits with a scale a row, or INT4 in groups. A tied head is the same matrix;
    its inputs stay in 16 bit."""
    kv: Literal["fp8", "int8"] | None = None
    """Round keys and values when they are cached, with calibrated scales."""
    bits: float | None = None
    """For `mixed`: average bits of a weight to stay within, scales included."""
    formats: tuple[str, ...] = ()
    """For `mixed`: what a layer may become, PRESET or PRESET:GROUP_SIZE; none given: 2 to 4 bits in two
    group sizes each, and 8 bits."""
    layer_formats: Mapping[str, str] = field(default_factory=dict)
    """Layers that get another format than the preset, PRESET, PRESET:GROUP_SIZE or 16bit, by full name."""
    self_text: bool = False
    """Calibrate on text that the model writes itself."""
    windows: int = 128
    """Calibration windows."""
    length: int = 512
    """Tokens of each."""
    weighting: Literal["none", "fisher"] | None = None
    """What a token counts for where errors of outputs are minimized: all alike, or by how much the model's
    predictions depend on it there (calibration/fisher.py), which takes a pass forward and back. None:
    fisher for the presets that end in -best, none for others."""
    drift: Literal["ignored", "corrected"] | None = None
    """Whether weights make up, before they are rounded, for half of what the layers before have changed
    (calibration/drift.py). None: corrected for the presets that end in -best, ignored for others."""
    iterations: int = 100
    """Steps of learned rounding for each layer."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("head", "kv"):
            if getattr(self, name) not in (None, "fp8", "int8"):
                raise SchemeError(
                    f"{name}={getattr(self, name)!r}. Use fp8 or int8, or leave --{name} out."
                )
        if self.embedding not in _EMBEDDINGS:
            raise SchemeError(f"embedding={self.embedding!r}. Use {', '.join(_EMBEDDINGS)}.")
        if self.weighting not in (None, "none", "fisher"):
            raise SchemeError(f"weighting={self.weighting!r}. Use none or fisher.")
        if self.drift not in (None, "ignored", "corrected"):
            raise SchemeError(f"drift={self.drift!r}. Use ignored or corrected.")
        for name in ("windows", "length", "iterations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}. Use 1 or more.")
        if self.mixes != (self.bits is not None):
            raise SchemeError(
                "bits and preset 'mixed' go together. Use --preset mixed --bits 5, for instance."
            )
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise SchemeError(
                f"bits={self.bits}. Use the bits that a weight may take on average, such as 4.5."
            )
        if self.formats and not self.mixes:
            raise SchemeError("formats are what the preset 'mixed' chooses from. Leave them out.")
        if self.layer_formats and (self.preset is None or self.mixes):
            raise SchemeError(
                "layer_formats are exceptions from a preset, and mixed chooses them itself. Leave them out."
            )

    @property
    def mixes(self) -> bool:
        """Whether the format of each layer is searched."""
        return self.preset in (MIXED, MIXED_BEST)

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count by the Fisher information."""
        return self._asks_for(self.weighting, "fisher")

    @property
    def corrects_drift(self) -> bool:
        """Whether weights make up for what the layers before have changed."""
        return self._asks_for(self.drift, "corrected")

    def _asks_for(self, given: str | None, value: str) -> bool:
        if given is not None:
            return given == value
        return self.preset is not None and self.preset.endswith(_BEST)


def plan_quantize(source: Checkpoint, plan: QuantizePlan, text: Text = BUILTIN) -> StagePlan:
    """What `quantize` would do, after every check that needs no weights.

    Raises SchemeError: an unknown preset, a group size that does not divide, a pattern that matches
    nothing or everything, a source that is already quantized. TextError: too little text.
    """
    documents = documents_of(text, "calibration") if reads_text(plan) else ()
    return prepare(source, plan, documents)[0]


def prepare(
    source: Checkpoint, plan: QuantizePlan, documents: Sequence[Document]
) -> tuple[StagePlan, Tensor | None]:
    """The stage, and the calibration windows [n, length]; None where nothing flows through layers,
    or the model is yet to write them."""
    _check_source(source)
    geometry = geometry_of(source)
    presets = chosen_presets(geometry, plan, dtype=source.dtype)
    if plan.weighting == "fisher" and not any(p.algorithm.needs_data for p in presets.values()):
        raise SchemeError(
            f"weighting fisher is for presets that minimize errors of outputs, and {plan.preset} does not. "
            "Leave --weighting out, or use one that does, such as int4-gptq."
        )
    rounds = any(p.algorithm.rounding != "nearest" for p in presets.values())
    if plan.drift == "corrected" and not rounds:
        raise SchemeError(
            f"drift corrected is for presets that round by GPTQ or learn to, and {plan.preset} does not. "
            "Leave --drift out, or use one that does, such as int4-gptq."
        )
    names = linear_names(geometry)
    schemes = {name: preset.scheme for name, preset in presets.items()}
    for name, scheme in schemes.items():
        scheme.check_fits(name, linear_shape(geometry, name))
    layout = Layout(schemes=schemes, kv_cache=kv_grid(plan.kv))
    windows = _windows(source, plan, presets, documents)
    parameters = asdict(plan) | {
        "weighting": "fisher" if plan.weighs_tokens else "none",
        "drift": "corrected" if plan.corrects_drift else "ignored",
        "algorithm": {n: asdict(p.algorithm) for n, p in _distinct(presets).items()},
        "scheme": {n: asdict(p.scheme) for n, p in _distinct(presets).items()},
        "left_in_16_bit": [n for n in names[:-1] if n not in presets],
    }
    if windows is not None:
        parameters |= {
            "windows": len(windows),
            "length": windows.shape[1],
            "windows_sha256": tensor_sha256(windows),
        }
    tokens = windows.numel() if windows is not None else 0
    stage = StagePlan(
        stage="quantize",
        parameters=parameters,
        inputs={"source": source},
        output_config=output_config(source, layout),
        output_bytes=_quantized_bytes(source, schemes),
        memory_bytes=_memory_bytes(geometry, presets, plan, tokens, source.dtype.itemsize),
        flops=_flops(geometry, presets, plan, tokens),
        code=code_digest("tinier.quantization.driver"),
        warnings=tuple(_warnings(source, plan, presets, windows)),
    )
    return stage, windows


def _split_groups(geometry: Geometry, presets: dict[str, Preset]) -> list[str]:
    """Layers with the same input that have several formats, 16 bit counted as one."""
    found = []
    for index in range(geometry.layers):
        for read in geometry.inputs:
            names = [f"{layer_name(index)}.{reader}" for reader in read.readers]
            if len({presets[name].scheme if name in presets else None for name in names}) > 1:
                found.append(", ".join(names))
    return found


def _warnings(
    source: Checkpoint, plan: QuantizePlan, presets: dict[str, Preset], windows: Tensor | None
) -> list[str]:
    """What to know beforehand: too little text, and loaders that cannot read the result."""
    warnings, geometry = [], geometry_of(source)
    if windows is not None and needs_text(plan):
        solves = any(p.algorithm.rounding != "nearest" for p in presets.values())
        widest = max(columns for _, columns in geometry.linears.values())
        warnings += shortfall(windows, plan.windows, widest if solves else 0)
    fitted = _group_size(geometry, plan, _plain(plan, presets))
    if fitted is not None and plan.group_size is None:
        warnings.append(
            f"groups of {fitted}: the preset's own size does not divide this model's layers"
        )
    grids = [preset.scheme.weights for preset in presets.values()]
    if not all(grid.symmetric for grid in grids):
        warnings.append(
            "transformers from 5.23 cannot load zero points packed beside INT4 weights (a shape mismatch "
            "in it); this engine and vLLM can"
        )
    if any(grid.kind == "e5m2" for grid in grids):
        warnings.append(
            "vLLM reads all 8-bit floats as E4M3 and would not compute these E5M2 weights; transformers "
            "and this engine do"
        )
    warnings += _embedding_warnings(geometry_of(source), plan)
    split = _split_groups(geometry_of(source), presets)
    if split:
        warnings.append(
            f"{split[0]} are not all quantized in the same way: vLLM multiplies them as one matrix and "
            "refuses that; transformers and this engine do not. Ignore all of them or none"
        )
    if source.dtype == torch.float16 and any(
        grid.kind == "float" and grid.bits == 4 for grid in grids
    ):
        warnings.append(
            "transformers unpacks FP4 weights to bfloat16 and cannot run them in a float16 model; this "
            "engine can"
        )
    if plan.kv is not None:
        warnings.append(
            "transformers from 5.24 on leaves the KV cache in 16 bit (compressed-tensors 0.20 knows it by "
            "its old name); this engine and vLLM round it"
        )
    if geometry_of(source).mixture is not None:
        warnings.append(
            "transformers 5.23 cannot load quantized experts, or leaves their inputs unrounded; this "
            "engine computes what is stored"
        )
    equalized = any(preset.algorithm.equalize != "none" for preset in presets.values())
    if equalized and geometry_of(source).norm_names.attention_in is None:
        warnings.append(
            "the inputs of attention and MLP are not equalized: no norm stands before them that could take "
            "the factors (o_proj and down_proj are)"
        )
    return warnings


def _embedding_warnings(geometry: Geometry, plan: QuantizePlan) -> list[str]:
    """Loaders that read no quantized embedding of this kind."""
    if plan.embedding == "16bit":
        return []
    also = " that is the head too" if geometry.tied_head else ""
    if plan.embedding == "int4":
        others = "transformers loads" if not geometry.tied_head else "transformers and vLLM load"
        return [
            f"{others} no packed embedding{also}; this engine does. --embedding 16bit keeps it as it is"
        ]
    return [
        f"vLLM loads no {plan.embedding} embedding{also}; transformers and this engine do. --embedding "
        "16bit keeps it as it is"
    ]


def mixed_formats(geometry: Geometry, plan: QuantizePlan) -> dict[str, Preset]:
    """What a layer may become with `mixed`, by label. Raises SchemeError for one that is none."""
    shapes = set(geometry.linears.values())
    labels = plan.formats
    if labels and plan.group_size is not None:
        raise SchemeError("formats name their group sizes, as int4-gptq:64. Leave group_size out.")
    if not labels:
        widest = plan.group_size or next(
            (s for s in (128, 64, 32) if all(columns % s == 0 for _, columns in shapes)), 32
        )
        sizes = (widest, widest // 2) if plan.group_size is None else (widest,)
        labels = (*(f"{name}:{size}" for name in _NARROW for size in sizes), "int8-w8a16")
    return {label: format_named(label) for label in labels}


def format_named(label: str) -> Preset:
    """PRESET or PRESET:GROUP_SIZE. Raises SchemeError."""
    name, colon, size = label.partition(":")
    if colon and not size.isdecimal():
        raise SchemeError(f"{label!r} is no format. Use PRESET or PRESET:GROUP_SIZE: int4-gptq:64")
    return preset_named(name, int(size) if colon else None)


def average_bits(geometry: Geometry, presets: Mapping[str, Preset], dtype: torch.dtype) -> float:
    """Of a weight of these linear layers, scales included."""
    shapes = {name: linear_shape(geometry, name) for name in presets}
    stored = sum(
        stored_bytes(preset.scheme, shapes[name], dtype) for name, preset in presets.items()
    )
    return 8 * stored / sum(rows * columns for rows, columns in shapes.values())


def _nearest_format(
    geometry: Geometry, plan: QuantizePlan, names: list[str], dtype: torch.dtype
) -> Preset:
    """The widest format that all layers may have within `bits`: what is planned with before the search.
    Raises SchemeError for bits that none keeps."""
    assert plan.bits is not None
    formats = mixed_formats(geometry, plan)
    for preset in formats.values():
        for name in names:
            preset.scheme.check_fits(name, linear_shape(geometry, name))
    bits = {
        label: average_bits(geometry, dict.fromkeys(names, preset), dtype)
        for label, preset in formats.items()
    }
    within = {label: b for label, b in bits.items() if b <= plan.bits}
    if not within:
        raise SchemeError(
            f"bits={plan.bits} is below {min(bits.values()):.2f}, which the narrowest format takes. "
            f"Use a number between it and {max(bits.values()):.2f}."
        )
    return formats[max(within, key=lambda label: within[label])]


def chosen_presets(
    geometry: Geometry, plan: QuantizePlan, mixed: Mapping[str, Preset] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Preset]:  # fmt: skip
    """Preset by full name of each linear layer that will be quantized, the head included.

    mixed: what the search chose for each layer; None: it has not run yet.
    """
    names = linear_names(geometry)[:-1]
    if plan.preset is None:
        if plan.group_size is not None or plan.symmetric is not None or plan.ignore:
            raise SchemeError(
                "preset null quantizes no layer. Leave --group-size, --asymmetric and --ignore out."
            )
        presets: dict[str, Preset] = {}
    else:
        ignored = _matching(names, plan.ignore)
        if len(ignored) == len(names):
            raise SchemeError(
                f"--ignore {' '.join(plan.ignore)} leaves no layer to quantize. Ignore fewer, or use "
                "--preset null."
            )
        left = [name for name in names if name not in ignored]
        if plan.mixes:
            if plan.symmetric is False:
                raise SchemeError(
                    "mixed chooses among formats without zero points. Leave --asymmetric out."
                )
            uniform = dict.fromkeys(left, _nearest_format(geometry, plan, left, dtype))
            presets = uniform if mixed is None else dict(mixed)
            if plan.preset == MIXED_BEST:
                presets = {name: _learned(preset) for name, preset in presets.items()}
        else:
            exceptions = _exceptions(geometry, plan, left)
            size = _group_size(geometry, plan, _plain(plan, left))
            preset = preset_named(plan.preset, size, symmetric=plan.symmetric)
            presets = dict.fromkeys(_plain(plan, left), preset) | exceptions
    return presets | _ends(geometry, plan)


def _plain(plan: QuantizePlan, names: Iterable[str]) -> list[str]:
    """Those of the decoder layers' names that have the plan's preset and no format of their own."""
    ends = (HEAD_LINEAR, EMBEDDING_MODULE)
    return [name for name in names if name not in plan.layer_formats and name not in ends]


def _group_size(geometry: Geometry, plan: QuantizePlan, names: list[str]) -> int | None:
    """What was asked for; else, where the preset's own size does not divide these layers, the largest usual
    one that does. None: the preset's own, or none."""
    if plan.preset is None or plan.mixes or plan.group_size is not None:
        return plan.group_size
    grid = preset_named(plan.preset).scheme.weights
    if grid.group_size is None or grid.scale_format != "model":
        return None
    sizes = {
        side
        for name in names
        for side in linear_shape(geometry, name)[0 if grid.granularity == "block" else 1 :]
    }
    for size in (grid.group_size, 64, 32, 16):
        if all(side % size == 0 for side in sizes):
            return None if size == grid.group_size else size
    return None


def _learned(preset: Preset) -> Preset:
    """With learned rounding, where weights alone are rounded to few bits."""
    if preset.scheme.activations is not None or preset.scheme.weights.bits > 4:
        return preset
    return replace(preset, algorithm=replace(preset.algorithm, rounding="learned"))


def _exceptions(geometry: Geometry, plan: QuantizePlan, names: list[str]) -> dict[str, Preset]:
    """The layers with a format of their own. Raises SchemeError for a name that is none, and for layers
    that share an input, which are rounded as one matrix, with different formats."""
    unknown = [name for name in plan.layer_formats if name not in names]
    if unknown:
        raise SchemeError(
            f"layer_formats names {unknown[0]!r}, which is not quantized. Names look like {names[0]}."
        )
    for index in range(geometry.layers):
        for read in geometry.inputs:
            together = [f"{layer_name(index)}.{reader}" for reader in read.readers]
            if len({plan.layer_formats.get(name) for name in together if name in names}) > 1:
                raise SchemeError(
                    f"{', '.join(together)} share an input and are rounded as one matrix. Give all of "
                    "them one format in layer_formats."
                )
    return {
        name: format_named(label)
        for name, label in plan.layer_formats.items()
        if label != SIXTEEN_BIT
    }


def _ends(geometry: Geometry, plan: QuantizePlan) -> dict[str, Preset]:
    """Those of the embedding and the head."""
    if plan.embedding == "16bit":
        return {HEAD_LINEAR: preset_named(plan.head)} if plan.head else {}
    if plan.head and geometry.tied_head:
        raise SchemeError(
            f"the head is the embedding, which becomes {plan.embedding}, and not {plan.head} too. "
            "Leave --head out."
        )
    preset = embedding_preset(plan.embedding, plan.group_size or table_group(geometry))
    ends = {EMBEDDING_MODULE: preset}
    if geometry.tied_head:
        ends[HEAD_LINEAR] = preset
    elif plan.head:
        ends[HEAD_LINEAR] = preset_named(plan.head)
    return ends


def layer_presets(presets: dict[str, Preset], prefix: str) -> LayerPresets:
    """Those of one decoder layer, by name inside it."""
    start = f"{prefix}."
    return {n.removeprefix(start): p for n, p in presets.items() if n.startswith(start)}


def reads_text(plan: QuantizePlan) -> bool:
    """Whether the plan needs calibration text that the model does not write itself."""
    return needs_text(plan) and not plan.self_text


def needs_text(plan: QuantizePlan) -> bool:
    """Whether the plan needs calibration text. Raises SchemeError for an unknown preset."""
    if plan.kv or plan.mixes:
        return True
    formats = [preset_named(plan.preset)] if plan.preset is not None else []
    others = set(plan.layer_formats.values()) - {SIXTEEN_BIT}
    formats += [format_named(label) for label in others]
    return any(preset.needs_data for preset in formats)


def kv_grid(kv: str | None) -> Grid | None:
    """Of the KV cache. kv: fp8 or int8."""
    if kv is None:
        return None
    return Grid(kind="float" if kv == "fp8" else "int", bits=8, granularity="tensor")


def table_group(geometry: Geometry) -> int:
    """The group size of an INT4 embedding: the largest usual one that divides."""
    return next(size for size in (128, 64, 32, 16) if geometry.hidden % size == 0)


def embedding_preset(kind: str, group_size: int | None) -> Preset:
    """Of an embedding stored as `kind` (fp8, int8, int4), and of a head that is the same matrix.
    group_size: of int4."""
    preset = preset_named(kind, group_size if kind == "int4" else None)
    # rounding what a head reads costs several times what rounding an INT8 table does (docs/log.md)
    return replace(preset, scheme=Scheme(weights=preset.scheme.weights))


def output_config(source: Checkpoint, layout: Layout) -> dict[str, object]:
    """config.json of the quantized checkpoint."""
    config = dict(source.config)
    if layout.schemes or layout.kv_cache:
        block = quantization_config(layout, module_names(geometry_of(source)))
        config["quantization_config"] = block
    if HEAD_LINEAR in layout.schemes and EMBEDDING_MODULE not in layout.schemes:
        config["tie_word_embeddings"] = False
    return config


def _windows(
    source: Checkpoint,
    plan: QuantizePlan,
    presets: dict[str, Preset],
    documents: Sequence[Document],
) -> Tensor | None:
    geometry = geometry_of(source)
    if needs_text(plan):
        check_length(source, plan.length)
        check_attention_window(source, plan.length)
        if plan.self_text:
            return None
        if not documents:
            raise InputError(f"{plan.preset} needs calibration text, and there is none. Give text.")
        tokenizer = load_tokenizer(source)
        return token_windows(tokenizer, documents, length=plan.length, count=plan.windows)
    if plan.self_text:
        raise InputError(f"{plan.preset} needs no calibration text. Leave --text out.")
    inside = [p for n, p in presets.items() if n not in (EMBEDDING_MODULE, HEAD_LINEAR)]
    if any(preset.algorithm.scales == "error" for preset in inside):
        # how large each channel is can be seen on any tokens; random ones need no text
        limits = [w for w in geometry.windows if w is not None]
        length = min([_PROBE_LENGTH, geometry.max_positions, *limits])
        generator = torch.Generator().manual_seed(plan.seed)
        return torch.randint(0, geometry.vocab, (_PROBE_WINDOWS, length), generator=generator)
    return None


def _distinct(presets: dict[str, Preset]) -> dict[str, Preset]:
    """Each preset once, under the name of the first layer that has it."""
    seen: dict[Preset, str] = {}
    for name, preset in presets.items():
        seen.setdefault(preset, name)
    return {name: preset for preset, name in seen.items()}


def _quantized_bytes(source: Checkpoint, schemes: dict[str, Scheme]) -> int:
    """Size on disk that the result will have, headers aside."""
    geometry = geometry_of(source)
    total = source.disk_bytes - source.weight_bytes + source.typed_bytes
    for name, scheme in schemes.items():
        rows, columns = linear_shape(geometry, name)
        if name == HEAD_LINEAR and geometry.tied_head:
            if EMBEDDING_MODULE not in schemes:  # it lies beside the embedding
                total += stored_bytes(scheme, (rows, columns), source.dtype)
            elif scheme.weights.bits == 8:
                total += rows * source.dtype.itemsize
            continue
        total += stored_bytes(scheme, (rows, columns), source.dtype)
        total -= rows * columns * source.dtype.itemsize
    return total


def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of a linear layer of `shape` [out, in] as it is stored."""
    grid = scheme.weights
    total = 0
    for name, size in stored_shapes(scheme, shape).items():
        count = torch.Size(size).numel()
        item = dtype.itemsize
        if name == "weight" or (name == "weight_packed" and grid.kind == "float"):
            item = 1
        elif name in ("weight_packed", "weight_zero_point") or "global" in name:
            item = 4
        elif name == "weight_scale" and grid.scale_format != "model":
            item = 1
        total += count * item
    return total


def _memory_bytes(
    geometry: Geometry, presets: dict[str, Preset], plan: QuantizePlan, tokens: int, item: int
) -> int:
    """Peak memory on the computing device, hidden states on the host included (CPU runs share it)."""
    per_weight = 14  # 16-bit weights, float32 copies of them, candidates and errors
    if any(p.algorithm.rounding == "learned" for p in presets.values()):
        per_weight = 44  # offsets, their gradient and Adam's two moments, and the weights they make
    if plan.corrects_drift:
        per_weight += 8  # the original's layer, the one quantized in turn, and other targets
    widths = [geometry.linears[read.readers[0]][1] for read in geometry.inputs]
    moments = 0
    if any(p.algorithm.needs_data for p in presets.values()):
        # one input's while its layers are rounded, or all that were summed: experts have many
        moments = max(32 * max(widths) ** 2, 12 * sum(width**2 for width in widths))
        if plan.corrects_drift:
            moments += 32 * max(widths) ** 2  # two products in float64, and their solution
    batch = BATCH_TOKENS * (8 * geometry.hidden + 6 * geometry.intermediate) * 2 if tokens else 0
    streams = 2 if per_weight > 14 else 1
    edge = 2 * geometry.vocab * geometry.hidden * item
    hidden = streams * tokens * geometry.hidden * item
    if plan.weighs_tokens:
        hidden += min(STATES_BYTES, geometry.layers * tokens * geometry.hidden * item)
    return max(edge, per_weight * geometry.layer_parameters + moments + batch) + hidden


def _flops(
    geometry: Geometry, presets: dict[str, Preset], plan: QuantizePlan, tokens: int
) -> float:
    """Arithmetic: two passes over the text, the inputs' second moments, GPTQ, learned rounding."""
    linear = geometry.active_layer_parameters
    flops = 4.0 * linear * tokens
    algorithms = {p.algorithm for p in presets.values()}
    if any(a.needs_data for a in algorithms):
        for name in (read.readers[0] for read in geometry.inputs):
            width = geometry.linears[name][1]
            reached = (
                geometry.top_k / geometry.experts if geometry.expert_of(name) is not None else 1
            )
            flops += 2.0 * tokens * reached * width**2 + 4.0 * width**3
    if plan.weighs_tokens:
        flops += 6.0 * linear * tokens
    if plan.corrects_drift:
        flops += 10.0 * linear * tokens
    if any(a.equalize != "none" for a in algorithms):
        flops += 20 * sum(2.0 * r * c * c for r, c in geometry.linears.values())
    if any(a.rounding != "nearest" for a in algorithms):
        flops += sum(float(r) * c * c for r, c in geometry.linears.values())
    if any(a.rounding == "learned" for a in algorithms):
        flops += plan.iterations * 6.0 * linear * 8 * plan.length
    return geometry.layers * flops


def _check_source(source: Checkpoint) -> None:
    if "quantization_config" in source.config:
        raise SchemeError(
            f"{source.folder} is quantized already. Quantize the 16-bit model that it was made from. If "
            f"there is none: tinier export {source.folder} --to 16bit --out DIR"
        )


def _matching(names: list[str], patterns: tuple[str, ...]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise SchemeError(
                f"--ignore {pattern!r} matches no layer. Names look like {names[0]}; "
                "use * for any part, such as '*.down_proj'."
            )
        matched.update(hits)
    return matched
