"""What each part costs in quality: measured once for a model and a text, kept, and used for every budget.

Start at `measure`. Every part is rounded to every format (`quantization/mixed.py`); the divergence at the
output that it causes alone is measured, and so is that of the embedding, of the KV cache, and of one cut of
each dimension that pruning can change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinier.calibration import DecoderWalk
from tinier.checkpoint import Checkpoint, write_atomically
from tinier.families import geometry_of
from tinier.progress import say
from tinier.pruning import Cut, PrunePlan, Sizes
from tinier.pruning.choice import CutCosts, measure_cuts
from tinier.pruning.importance import cut_to, measure_importance
from tinier.quantization.mixed import (
    EMBEDDING_FORMATS,
    EMBEDDING_PART,
    KV_FORMATS,
    KV_PART,
    Rounded,
    divergences,
    final_states,
    measure_parts,
    one_each,
    parts_of,
    predicted_costs,
)
from tinier.schemes import Preset

_CUT_TOKENS = 4096


@dataclass
class Sensitivity:
    """What was measured of one model on one text."""

    rounded: Rounded
    windows: Tensor
    """[n, length]: those that whole models are measured on"""
    divergence: dict[str, dict[str, float]]
    """Nats per token of each part alone, by part and format"""
    cuts: CutCosts | None
    dropped: dict[int, tuple[int, ...]]
    """Which layers go, by how many are left"""


def measure(
    source: Checkpoint, formats: Mapping[str, Preset], windows: Tensor, folder: Path,
    device: torch.device, *, align: int | None,
) -> Sensitivity:  # fmt: skip
    """Measure what `folder` does not hold yet. windows: [n, length] of calibration text, of which a quarter
    at most is kept for measuring. align: measure cuts to widths in multiples of this, too."""
    kept = max(1, min(len(windows) // 4, -(-_CUT_TOKENS // windows.shape[1])))
    calibration, measured = (
        (windows[:-kept], windows[-kept:]) if len(windows) > 1 else (windows, windows)
    )
    walk = DecoderWalk(source, windows.shape[1], device)
    rounded = Rounded(source, walk, formats, parts_of(geometry_of(source)), folder / "rounded")
    say(f"fit: rounds {len(rounded.parts)} parts to {len(formats)} formats")
    rounded.make(calibration)
    path = folder / "divergence.json"
    if not path.exists():
        write_atomically(path, json.dumps(_divergence(rounded, measured)))
    divergence = json.loads(path.read_text("utf-8"))
    if align is None:
        return Sensitivity(rounded, measured, divergence, None, {geometry_of(source).layers: ()})
    cuts, dropped = _cuts(source, windows, measured, align, folder / "cuts.json", device)
    return Sensitivity(rounded, measured, divergence, cuts, dropped)


def _divergence(rounded: Rounded, windows: Tensor) -> dict[str, dict[str, float]]:
    """Nats per token, by part and format."""
    formats = rounded.formats
    weights_only = {label: p for label, p in formats.items() if p.scheme.activations is None}
    coarse = one_each(weights_only)
    # rounded inputs are not in the error of the weights, so that these are measured themselves
    others = [label for label in formats if label not in weights_only]
    say(f"fit: measures the divergence of each part in {len(coarse) + len(others)} formats")
    found = measure_parts(rounded, [*coarse, *others], windows)
    errors = rounded.errors()
    points = {part: {label: kls[label] for label in coarse} for part, kls in found.items()}
    costs = predicted_costs(errors, points)
    choices: list[dict[str, str]] = [{EMBEDDING_PART: kind} for kind in EMBEDDING_FORMATS]
    choices += [{KV_PART: kind} for kind in KV_FORMATS]
    choices += [dict.fromkeys(found, label) for label in others]
    exact, *states = final_states(rounded, [{}, *choices], windows)
    wholes = divergences(rounded, exact, states, choices)
    for choice, kl in zip(choices[: -len(others) or None], wholes, strict=False):
        ((part, kind),) = choice.items()
        costs.setdefault(part, {})[kind] = kl
    for label, kl in zip(others, wholes[len(choices) - len(others) :], strict=True):
        # so little that parts alone are hardly seen: the whole is shared out along what was seen of them
        least = sum(kls[label] for kls in found.values()) / len(found) / 4 + 1e-9
        seen = {part: max(kls[label], least) for part, kls in found.items()}
        for part, share in seen.items():
            costs[part][label] = kl * share / sum(seen.values())
    return costs


def _cuts(
    source: Checkpoint,
    windows: Tensor,
    measured: Tensor,
    align: int,
    path: Path,
    device: torch.device,
) -> tuple[CutCosts, dict[int, tuple[int, ...]]]:
    """What sizes cost, and which layers go when some do."""
    geometry = geometry_of(source)
    importance = measure_importance(source, windows, device=device)
    counts = range(1, geometry.layers - (geometry.layers + 1) // 2 + 1)
    dropped = {0: ()} | {count: importance.nearest_block(count) for count in counts}

    def cut(sizes: Sizes) -> Cut:
        gone = dropped[geometry.layers - sizes.layers]
        kept = tuple(layer for layer in range(geometry.layers) if layer not in gone)
        return cut_to(geometry, sizes, kept, importance)

    by_layers = {geometry.layers - count: gone for count, gone in dropped.items()}
    if path.exists():
        return CutCosts(Sizes.of(geometry), json.loads(path.read_text("utf-8"))), by_layers
    say("fit: measures what layers, channels, neurons and heads are worth")
    costs = measure_cuts(source, PrunePlan(target="1B", align=align), measured, cut, device)
    write_atomically(path, json.dumps(costs.per_share))
    return costs, by_layers
