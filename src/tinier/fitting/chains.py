"""A design as the variants of a recipe: prune, heal, quantize, in this order; or trained on the grid.

Start at `variants_of`.
"""

from collections import Counter
from dataclasses import dataclass

from tinier.families import Geometry
from tinier.fitting.costs import Design
from tinier.pruning import Sizes
from tinier.quantization.mixed import EMBEDDING_PART, KV_PART, parts_of
from tinier.quantization.plan import NULL, SIXTEEN_BIT, table_group
from tinier.recipe.schema import BASE, Distill, Prune, Quantize, Variant

_GRID_RATE, _HEAL_RATES = 5e-5, (3e-4, 7e-5)
_SMALL = 1e9
"""Parameters of a model that stands the higher learning rate"""


@dataclass(frozen=True)
class Effort:
    """How much text the stages look at."""

    windows: int
    length: int
    batch: int
    """Windows of a training step"""
    training_length: int
    align: int
    """Widths are multiples of this: what matrix units are fast at"""


def variants_of(
    design: Design, name: str, geometry: Geometry, effort: Effort
) -> dict[str, Variant]:
    """The variants that make a design, the last one called `name`."""
    whole, made, source = Sizes.of(geometry), dict[str, Variant](), BASE
    if design.sizes != whole:
        source = sizes_name(design.sizes, whole)
        made[source] = Variant(prune=_prune(design, whole, effort))
        if design.steps:
            healed = f"{source}-healed{design.steps}"
            rate = _HEAL_RATES[geometry.parameters > _SMALL]
            made[healed] = _from(source, distill=_distill(design.steps, rate, effort))
            source = healed
    quantize = _quantize(design, geometry, effort)
    if quantize is None:
        return made
    if design.grid_steps:
        distill = _distill(design.grid_steps, _GRID_RATE, effort, quantize)
        made[name] = _from(source, distill=distill)
    else:
        made[name] = _from(source, quantize=quantize)
    return made


def _from(source: str, quantize: Quantize | None = None, distill: Distill | None = None) -> Variant:
    return Variant.model_validate({"from": source, "quantize": quantize, "distill": distill})


def name_of(design: Design, whole: Sizes, bits: float) -> str:
    """Such as `26L-healed40-4.13b`. bits: of a parameter, as stored."""
    parts = []
    if design.sizes != whole:
        parts.append(sizes_name(design.sizes, whole))
        if design.steps:
            parts.append(f"healed{design.steps}")
    if not _is_plain(design):
        parts.append(f"{bits:.2f}b")
    return "-".join(parts)


def sizes_name(sizes: Sizes, whole: Sizes) -> str:
    parts = [f"{sizes.layers}L"]
    for name, letter in (("hidden", "h"), ("intermediate", "i"), ("kv_heads", "kv")):
        if getattr(sizes, name) != getattr(whole, name):
            parts.append(f"{letter}{getattr(sizes, name)}")
    return "-".join(parts)


def _is_plain(design: Design) -> bool:
    return set(design.formats.values()) == {SIXTEEN_BIT}


def _prune(design: Design, whole: Sizes, effort: Effort) -> Prune:
    sizes = design.sizes
    wide = {
        f"keep_{name}": getattr(sizes, name)
        for name in ("hidden", "intermediate", "heads", "kv_heads")
        if getattr(sizes, name) != getattr(whole, name)
    }
    if design.dropped:
        wide["drop_layers"] = ",".join(map(str, design.dropped))
    return Prune(**wide, align=effort.align, windows=effort.windows, length=effort.length)


def _distill(steps: int, rate: float, effort: Effort, quantize: Quantize | None = None) -> Distill:
    return Distill(
        steps=steps, batch=effort.batch, length=effort.training_length,
        lr=rate, min_lr=rate / 10, quantize=quantize,
    )  # fmt: skip


def _quantize(design: Design, geometry: Geometry, effort: Effort) -> Quantize | None:
    """The formats of all layers that are left, by their names there."""
    if _is_plain(design):
        return None
    kept = [i for i in range(geometry.layers) if i not in design.dropped]
    formats: dict[str, str] = {}
    for part in parts_of(geometry):
        if part.layer in kept:
            renamed = part._replace(layer=kept.index(part.layer))
            formats |= dict.fromkeys(renamed.members, design.formats[part.name])
    embedding, kv = design.formats[EMBEDDING_PART], design.formats[KV_PART]
    (usual, _), *_ = Counter(formats.values()).most_common()
    if embedding == "int4":  # its groups are the preset's
        usual = f"int4-gptq:{table_group(geometry)}"
    preset, _, size = usual.partition(":")
    if usual == SIXTEEN_BIT:
        others = [label for label in formats.values() if label != SIXTEEN_BIT]
        preset, _, size = (others[0] if others else NULL).partition(":")
    given = f"{preset}:{size}" if size else preset
    return Quantize(
        preset=None if preset == NULL else preset,
        group_size=int(size) if size else None,
        layer_formats={} if preset == NULL else {n: f for n, f in formats.items() if f != given},
        embedding=embedding,  # type: ignore[arg-type]
        kv=None if kv == SIXTEEN_BIT else kv,  # type: ignore[arg-type]
        windows=effort.windows,
        length=effort.length,
        weighting="fisher" if design.fisher else None,
        drift="corrected" if design.fisher else None,
    )
