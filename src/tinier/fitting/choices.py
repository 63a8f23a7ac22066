"""What a model may become: formats of layers, and widths that pruning may leave."""

from collections.abc import Mapping, Sequence

import torch

from tinier.families import Geometry
from tinier.kernels.machine import machine_of
from tinier.pruning import PrunePlan, Sizes
from tinier.pruning.plan import possible_sizes, resized
from tinier.quantization.plan import format_named
from tinier.schemes import Preset


def default_formats(
    given: Sequence[str], geometry: Geometry, device: torch.device
) -> dict[str, Preset]:
    """What a layer may become, by label: as given, or few bits in two group sizes, and what the device
    multiplies. Raises SchemeError for a format that the layers do not fit."""
    labels = list(given)
    if not labels:
        columns = {columns for _, columns in geometry.linears.values()}
        wide = next((s for s in (128, 64, 32) if all(c % s == 0 for c in columns)), 32)
        labels = [
            f"{name}:{size}" for name in ("int2", "int3", "int4-gptq") for size in (wide, wide // 2)
        ]
        labels += ["int8-w8a16", "int8-sq"]
        machine = machine_of(device)
        if machine.has_fp8:
            labels.append("fp8")
        if machine.kind == "cuda" and machine.capability >= (10, 0):
            labels.append("nvfp4")
    found = {label: format_named(label) for label in labels}
    for label, preset in found.items():
        for name, shape in geometry.linears.items():
            preset.scheme.check_fits(f"{label}: {name}", shape)
    return found


def least_bytes(geometry: Geometry, formats: Mapping[str, Preset], align: int | None) -> float:
    """Fewer bytes than any model has that `fit` may choose: the codes alone of its narrowest formats, at
    the smallest sizes. align: of pruned widths; None: sizes stay."""
    sizes, layers = [Sizes.of(geometry)], geometry.layers
    if align is not None:
        sizes = list(possible_sizes(geometry, PrunePlan(target="1B", shrink="width", align=align)))
        layers = (geometry.layers + 1) // 2  # no fewer stay
    bits = min(preset.scheme.weights.bits for preset in formats.values())

    def of(one: Geometry) -> float:
        linear = layers * sum(rows * columns for rows, columns in one.linears.values())
        head = 0 if one.tied_head else 16
        return (linear * bits + one.vocab * one.hidden * (4 + head)) / 8

    return min(of(resized(geometry, one)) for one in sizes)


def possible_widths(geometry: Geometry, formats: Mapping[str, Preset], align: int) -> list[Sizes]:
    """The widths that pruning may leave and all formats fit, the model's own last."""
    later = tuple(preset.scheme for preset in formats.values())
    plan = PrunePlan(target="1B", shrink="width", later=later, align=align)
    found = sorted(
        possible_sizes(geometry, plan), key=lambda s: (s.hidden * s.intermediate, s.kv_heads)
    )
    whole = Sizes.of(geometry)
    return [*(sizes for sizes in found if sizes != whole), whole]


def measured_widths(geometry: Geometry, formats: Mapping[str, Preset], align: int) -> list[Sizes]:
    """The narrowest, one halfway and the model's own."""
    widths = possible_widths(geometry, formats, align)
    narrow, whole = widths[0], widths[-1]

    def off(sizes: Sizes) -> float:
        """From halfway, in shares of what lies between."""
        total = 0.0
        for name in ("hidden", "intermediate", "kv_heads"):
            low, high, own = (float(getattr(s, name)) for s in (narrow, whole, sizes))
            total += abs((own - low) / (high - low) - 0.5) if high > low else 0.0
        return total

    return list(dict.fromkeys([narrow, min(widths, key=off), whole]))


def first_tries(formats: dict[str, Preset]) -> list[str]:
    """One label each of 8 and of 4 bits."""
    eight = [label for label, p in formats.items() if p.scheme.weights.bits == 8]
    four = [label for label, p in formats.items() if p.scheme.weights.bits == 4]
    return [*eight[-1:], *four[:1]] or list(formats)[:1]
