"""What a pruning will do: every check that needs no weights, and its cost.

Start at `plan_prune`. Sizes are given one by one, or a target that they are to be chosen for; which
layers, channels, neurons and heads go is measured in either case, unless the layers are named.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tinier.calibration import check_attention_window
from tinier.checkpoint import SHARD_BYTES, Checkpoint, StagePlan, code_digest
from tinier.errors import InputError, SchemeError
from tinier.families import Geometry, check_length, geometry_of
from tinier.pruning.cut import Cut, Sizes
from tinier.pruning.importance import cut_to
from tinier.pruning.refit import linears_to_refit
from tinier.schemes import Scheme
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

Method = Literal["influence", "angular", "loss", "greedy", "last"]
METHODS: tuple[Method, ...] = ("influence", "angular", "loss", "greedy", "last")
# a target is met from below, by at most this much of it
_MOST_LAYERS = 10_000
"""More than any model has: a range that is typed wrongly must not fill the memory."""
_SLACK = 0.05
_UNITS = {"M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "ms": 1.0}


class Target(NamedTuple):
    value: float
    kind: Literal["parameters", "bytes", "milliseconds"]
    """Parameters, bytes of all weights, or the time of one decode step at batch 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    drop_layers: tuple[int, ...] = ()
    """Layers to remove, counted from 0."""
    keep_layers: int | str | None = None
    """How many layers stay, or a share such as `75%`; which ones, `method` decides."""
    method: Method = "angular"
    """`influence`: the layers that turn their inputs least (block influence); `angular`: the layers in
    a row between whose ends the states turn least; `loss`: the better of the layers in a row and those
    of least influence, by the divergence after removal, which is measured; `greedy`: one after the
    other, each time the one whose removal costs least divergence; `last`: the last ones."""
    keep_hidden: int | str | None = None
    """Hidden channels that stay, or a share."""
    keep_intermediate: int | str | None = None
    """Neurons of the MLP that stay, or a share."""
    keep_heads: int | None = None
    """Query heads that stay; as many in each KV group."""
    keep_kv_heads: int | None = None
    """KV heads that stay, each with its query heads."""
    keep_experts: int | None = None
    """Experts of a mixture that stay in each layer: those that carry most of its output."""
    target: str | None = None
    """Sizes to be chosen: at most so many parameters (`2.4B`, `100M`), bytes of weights (`5GB`,
    `200MB`), or milliseconds of a decode step on this device (`8ms`)."""
    shrink: Literal["depth", "width", "both"] = "both"
    """Which sizes a target may change."""
    align: int = 64
    """Channels and neurons are kept in multiples of this, for matrix units."""
    candidates: int = 8
    """Choices of sizes that are measured for a target."""
    refit: bool = True
    """Solve for the weights that stand in best for what goes, by least squares."""
    windows: int = 64
    """Calibration windows."""
    length: int = 512
    """Tokens in one calibration window."""
    later: tuple[Scheme, ...] = ()
    """How later stages will store the linear layers: sizes for a target are chosen so that they can."""

    def __post_init__(self) -> None:
        for name in ("align", "candidates", "windows", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}. Use 1 or more.")

    @property
    def chooses(self) -> bool:
        """Whether what goes is chosen by looking at calibration text."""
        wide = (
            self.keep_hidden, self.keep_intermediate, self.keep_heads, self.keep_kv_heads,
            self.keep_experts, self.target,
        )  # fmt: skip
        by_layer = self.keep_layers is not None and self.method != "last"
        return by_layer or any(value is not None for value in wide)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers from `21-27`, `3,5,7` or both mixed. Raises InputError."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise InputError(
                f"layers {text!r}: {part!r} is no number or range. Use 21-27 or 3,5,7."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"layers {text!r}: {part!r} runs backwards. Use {last}-{first}.")
        if last >= _MOST_LAYERS:
            raise InputError(
                f"layers {text!r}: no model has a layer {last}. Use numbers below its number of layers, "
                "such as 21-27."
            )
        numbers += range(first, last + 1)
    return tuple(sorted(set(numbers)))


def parse_target(text: str) -> Target:
    """A number of parameters, bytes or milliseconds. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(M|B|MB|GB|ms)\s*", text)
    if match is None or float(match[1]) == 0:
        raise InputError(
            f"target {text!r} is not understood. Use parameters (100M, 2.4B), bytes of weights "
            "(200MB, 5GB) or a decode step (8ms)."
        )
    kind: Literal["parameters", "bytes", "milliseconds"] = "parameters"
    if match[2] in ("MB", "GB"):
        kind = "bytes"
    elif match[2] == "ms":
        kind = "milliseconds"
    return Target(float(match[1]) * _UNITS[match[2]], kind)


def plan_prune(source: Checkpoint, plan: PrunePlan, text: Text = BUILTIN) -> StagePlan:
    """What `prune` would do, after every check that needs no weights.

    Raises InputError: nothing to remove, a layer or size out of range, sizes that do not fit together;
    SchemeError for a quantized source; TextError for a text that cannot be used.
    """
    return prepare(source, plan, documents_of(text, "calibration"))[0]


def prepare(
    source: Checkpoint, plan: PrunePlan, documents: Sequence[Document]
) -> tuple[StagePlan, Tensor | None]:
    """The stage and the calibration windows [n, length]; None where nothing is measured."""
    if "quantization_config" in source.config:
        raise SchemeError(
            f"{source.folder} is quantized. Prune first, then quantize the result. If there is no 16-bit "
            f"model: tinier export {source.folder} --to 16bit --out DIR"
        )
    geometry = geometry_of(source)
    sizes = wanted_sizes(source, plan)
    if plan.target is not None:
        sizes = _sizes_for_plan(source, plan)
    parameters: dict[str, Any] = asdict(plan) | {"drop_layers": list(plan.drop_layers)}
    windows = None
    first = _first_cut(geometry, sizes, plan)
    solves = plan.refit and (plan.target is not None or bool(linears_to_refit(first, geometry)))
    if solves and not documents:
        raise InputError(
            "refitting what is left needs calibration text. Give text, or refit=False."
        )
    if plan.chooses or solves:
        check_length(source, plan.length)
        check_attention_window(source, plan.length)
        windows = calibration_windows(source, plan, documents)
        # what is kept is an outcome; these decide it
        parameters |= {"windows": len(windows), "windows_sha256": tensor_sha256(windows)}
    after = resized(geometry, sizes)
    tokens = 0 if windows is None else windows.numel()
    passes = {"loss": geometry.layers, "greedy": geometry.layers**2 / 8}.get(plan.method, 1)
    passes = (passes if plan.chooses else 0) + 2 * solves
    stage = StagePlan(
        stage="prune",
        parameters=parameters,
        inputs={"source": source},
        # which parts go may be open still, and so may sizes for a target: those here are possible
        output_config=first.config(source.config, geometry),
        output_bytes=source.disk_bytes
        - source.weight_bytes
        + source.typed_bytes
        - (geometry.parameters - after.parameters) * source.dtype.itemsize,
        memory_bytes=min(SHARD_BYTES, source.weight_bytes)
        + 4 * geometry.layer_parameters
        + 3 * 8 * max(geometry.intermediate, geometry.hidden) ** 2 * solves
        + 4 * tokens * geometry.hidden * (32 if plan.method in ("loss", "greedy") else 2)
        + 4 * tokens * geometry.hidden * 3 * (solves and geometry.mixture is not None),
        flops=2.0 * geometry.active_parameters * tokens * passes,
        code=code_digest("tinier.pruning.driver"),
        warnings=tuple(_warnings(plan, geometry, windows, solves=solves)),
    )
    return stage, windows


def _warnings(
    plan: PrunePlan, geometry: Geometry, windows: Tensor | None, *, solves: bool
) -> list[str]:
    warnings = []
    if windows is not None:
        widest = geometry.intermediate if solves else 0
        if geometry.mixture is not None:  # each expert sees its own tokens
            widest = widest * geometry.experts // geometry.top_k
        warnings += shortfall(windows, plan.windows, widest)
    if plan.refit and geometry.norm_names.mlp_out is not None:
        warnings.append(
            "nothing stands in for layers that are dropped: what the MLP adds goes through a norm, so no "
            "linear layer can be solved for (neurons and heads that go are made up for)"
        )
    if plan.refit and geometry.mixture is not None:
        warnings.append(
            "nothing stands in for layers that are dropped: in a mixture of experts no single linear layer "
            "writes for all tokens (experts, neurons and heads that go are made up for)"
        )
    if geometry.head_norms == "all" and (plan.keep_heads or plan.keep_kv_heads):
        warnings.append(
            "heads that stay change as others go: q and k are normed over all heads together"
        )
    return warnings


def _sizes_for_plan(source: Checkpoint, plan: PrunePlan) -> Sizes:
    """Sizes that the target may lead to; which ones is measured. Raises InputError where there are none."""
    assert plan.target is not None
    target = parse_target(plan.target)
    if target.kind != "milliseconds":
        return max(
            sizes_within(source, plan, target, stored_cost(source, target)).items(), key=_cost
        )[0]
    # how long a step takes is measured on the device; the largest that can be stored stands for it
    cost = stored_cost(source, Target(float("inf"), "parameters"))
    return max(_some_possible(source, plan), key=cost)


def _cost(item: tuple[Sizes, float]) -> float:
    return item[1]


def calibration_windows(
    source: Checkpoint, plan: PrunePlan, documents: Sequence[Document]
) -> Tensor:
    return token_windows(load_tokenizer(source), documents, length=plan.length, count=plan.windows)


def resized(geometry: Geometry, sizes: Sizes) -> Geometry:
    """The geometry with other sizes."""
    return replace(geometry, **asdict(sizes))


def wanted_sizes(source: Checkpoint, plan: PrunePlan) -> Sizes:
    """The sizes that are asked for; the source's where a target leaves them open.

    Raises InputError for everything that does not fit.
    """
    geometry, name, itemsize = geometry_of(source), source.folder.name, source.dtype.itemsize
    total = geometry.layers
    if plan.method not in METHODS:
        raise InputError(f"method={plan.method!r}. Use one of {', '.join(METHODS)}.")
    if plan.shrink not in ("depth", "width", "both"):
        raise InputError(f"shrink={plan.shrink!r}. Use depth, width or both.")
    explicit = (
        plan.keep_layers, plan.keep_hidden, plan.keep_intermediate, plan.keep_heads,
        plan.keep_kv_heads, plan.keep_experts,
    )  # fmt: skip
    if plan.target is not None:
        if plan.drop_layers or any(value is not None for value in explicit):
            raise InputError("a target chooses all sizes. Give --target, or the sizes.")
        _check_target(geometry, parse_target(plan.target), itemsize)
        return Sizes.of(geometry)
    if plan.drop_layers and plan.keep_layers is not None:
        raise InputError(
            "give either --drop-layers 21-27 (which go) or --keep-layers 75% (how many stay)."
        )
    if not plan.drop_layers and all(value is None for value in explicit):
        raise InputError(
            "nothing to remove. Give --drop-layers 21-27, --keep-layers 75%, --keep-hidden, "
            "--keep-intermediate, --keep-heads, --keep-kv-heads, --keep-experts or --target 100M."
        )
    experts = _experts(plan.keep_experts, geometry, name)
    outside = [layer for layer in plan.drop_layers if not 0 <= layer < total]
    if outside:
        raise InputError(f"layers {outside} do not exist: {name} has layers 0 to {total - 1}.")
    layers = total - len(plan.drop_layers)
    if plan.keep_layers is not None:
        layers = _layers(plan.keep_layers, total)
    if layers < 1:
        raise InputError(f"dropping all of {total} layers leaves none. Drop at most {total - 1}.")
    kv_heads = _heads(plan.keep_kv_heads, geometry.kv_heads, 1, "keep_kv_heads")
    grouped = geometry.heads // geometry.kv_heads * kv_heads
    heads = _heads(plan.keep_heads, grouped, kv_heads, "keep_heads")
    step = hidden_step(geometry, heads, plan.align)
    hidden = _channels(plan.keep_hidden, geometry.hidden, step, "keep_hidden")
    if geometry.hidden_in_heads and hidden % heads:
        raise InputError(
            f"{heads} heads do not divide the hidden size {hidden}, which transformers asks for in "
            f"this family. Keep another number of heads, or --keep-hidden {hidden // step * step}."
        )
    return Sizes(
        layers=layers,
        hidden=hidden,
        intermediate=_channels(
            plan.keep_intermediate, geometry.intermediate, plan.align, "keep_intermediate"
        ),
        heads=heads,
        kv_heads=kv_heads,
        experts=experts,
    )


def possible_sizes(geometry: Geometry, plan: PrunePlan) -> Iterator[Sizes]:
    """Every choice of sizes down to half of each that later stages can store."""

    def multiples(total: int, step: int) -> list[int]:
        return [n for n in range(step, total, step) if 2 * n >= total] + [total]

    width, depth = plan.shrink != "depth", plan.shrink != "width"
    layers = range((geometry.layers + 1) // 2, geometry.layers + 1)
    groups = range((geometry.kv_heads + 1) // 2, geometry.kv_heads + 1)
    per_group = geometry.heads // geometry.kv_heads
    # in few steps: there may be hundreds
    eighths = multiples(geometry.experts, max(1, geometry.experts // 8))
    experts_kept = [n for n in eighths if n >= geometry.top_k]
    for count, kv_heads in product(
        layers if depth else [geometry.layers], groups if width else [geometry.kv_heads]
    ):
        heads = per_group * kv_heads
        step = hidden_step(geometry, heads, plan.align)
        for hidden, intermediate, experts in product(
            multiples(geometry.hidden, step) if width else [geometry.hidden],
            multiples(geometry.intermediate, plan.align) if width else [geometry.intermediate],
            experts_kept if width else [geometry.experts],
        ):
            if geometry.hidden_in_heads and hidden % heads:
                continue
            sizes = Sizes(
                layers=count,
                hidden=hidden,
                intermediate=intermediate,
                heads=heads,
                kv_heads=kv_heads,
                experts=experts,
            )
            if _fits_later(geometry, sizes, plan.later):
                yield sizes


def _fits_later(geometry: Geometry, sizes: Sizes, later: tuple[Scheme, ...]) -> bool:
    linears = resized(geometry, sizes).linears
    try:
        for scheme in later:
            for name, shape in linears.items():
                scheme.check_fits(name, shape)
    except SchemeError:
        return False
    return True


def sizes_within(
    source: Checkpoint, plan: PrunePlan, target: Target, cost: Callable[[Sizes], float]
) -> dict[Sizes, float]:
    """The possible sizes that come near a target from below, with their cost in its unit.

    Raises InputError where there are none.
    """
    costs = {sizes: cost(sizes) for sizes in _some_possible(source, plan)}
    least = (1 - _SLACK) * target.value
    within = {sizes: own for sizes, own in costs.items() if least <= own <= target.value}
    if not within:
        raise InputError(
            f"no sizes between half of the model and all of it come within {_SLACK:.0%} below the target "
            f"{plan.target}. The smallest has {min(costs.values()):.4g} {target.kind}; use "
            "--shrink both, a smaller --align, or another target."
        )
    return within


def _some_possible(source: Checkpoint, plan: PrunePlan) -> list[Sizes]:
    found = list(possible_sizes(geometry_of(source), plan))
    if not found:
        labels = ", ".join(scheme.label for scheme in plan.later)
        raise InputError(
            f"no sizes between half of the model and all of it can be stored as {labels} later. Use "
            "another --align, or other group sizes."
        )
    return found


def stored_cost(source: Checkpoint, target: Target) -> Callable[[Sizes], float]:
    """What sizes cost in parameters or bytes."""
    geometry = geometry_of(source)
    size = 1 if target.kind == "parameters" else source.dtype.itemsize
    return lambda sizes: float(resized(geometry, sizes).parameters * size)


def hidden_step(geometry: Geometry, heads: int, align: int) -> int:
    """What the hidden size must be a multiple of, with so many heads."""
    return math.lcm(align, heads) if geometry.hidden_in_heads else align


def _layers(wanted: int | str, total: int) -> int:
    """How many stay, of a count or a share."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(wanted))
    if match is None or (not match[2] and "." in match[1]):
        raise InputError(
            f"keep_layers={wanted!r} is no count and no share. Use {total - 1} or 75%."
        )
    # a share is rounded up: 75 % of 30 layers is 23
    kept = math.ceil(total * float(match[1]) / 100) if match[2] else int(match[1])
    if not 0 < kept < total:
        raise InputError(f"keep_layers={wanted!r} keeps {kept} of {total}. Keep 1 to {total - 1}.")
    return kept


def _channels(wanted: int | str | None, total: int, align: int, name: str) -> int:
    """How many stay: as asked, or a share in whole multiples of `align`."""
    if wanted is None:
        return total
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", str(wanted))
    if share is not None:
        kept = round(total * float(share[1]) / 100 / align) * align
    elif str(wanted).isdecimal():
        kept = int(wanted)
        if kept <= total and kept % align:
            below = kept // align * align
            near = " or ".join(str(size) for size in (below, below + align) if 0 < size <= total)
            raise InputError(
                f"{name}={kept} is no multiple of {align}. Use {f'{near}, or ' if near else ''}"
                "another --align."
            )
    else:
        raise InputError(f"{name}={wanted!r} is no size and no share. Use {total // 2} or 50%.")
    if not 0 < kept <= total:
        raise InputError(
            f"{name}={wanted!r} keeps {kept} of {total}. Keep {min(align, total)} to {total}; the smaller "
            "--align, the fewer can stay."
        )
    return kept


def _heads(wanted: int | None, total: int, multiple: int, name: str) -> int:
    if wanted is None:
        return total
    allowed = range(multiple, total + 1, multiple)
    if wanted not in allowed:
        raise InputError(f"{name}={wanted}. Use one of {', '.join(map(str, allowed))}.")
    return wanted


def _experts(wanted: int | None, geometry: Geometry, name: str) -> int:
    if wanted is None:
        return geometry.experts
    if geometry.mixture is None:
        raise InputError(
            f"--keep-experts: {name} is no mixture of experts. Use --keep-intermediate."
        )
    if not geometry.top_k <= wanted <= geometry.experts:
        raise InputError(
            f"keep_experts={wanted}: each token goes through {geometry.top_k} of {geometry.experts}. "
            f"Keep {geometry.top_k} to {geometry.experts}."
        )
    return wanted


def _check_target(geometry: Geometry, target: Target, itemsize: int) -> None:
    size = {"parameters": 1, "bytes": itemsize}.get(target.kind)
    if size and target.value >= geometry.parameters * size:
        raise InputError(
            f"the target of {target.value:.4g} {target.kind} is not below the model's "
            f"{geometry.parameters * size:.4g}. Use a smaller one."
        )


def _first_cut(geometry: Geometry, sizes: Sizes, plan: PrunePlan) -> Cut:
    """A cut of the right sizes, whichever parts it keeps."""
    dropped = set(plan.drop_layers or range(sizes.layers, geometry.layers))
    kept = tuple(layer for layer in range(geometry.layers) if layer not in dropped)
    return cut_to(geometry, sizes, kept, None)
