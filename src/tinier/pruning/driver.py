"""Prune a checkpoint: folder in, folder out. Start at `prune`.

Layers, channels of the residual stream, neurons and attention heads are removed; what is left is a
plain model of the same architecture, in standard format, which needs nothing of ours to load.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tinier.checkpoint import (
    Checkpoint,
    StagePlan,
    TensorWriter,
    atomic_folder,
    check_output,
    copy_side_files,
    open_checkpoint,
    write_config,
)
from tinier.device import check_memory, pick_device, reset_peak_memory
from tinier.families import geometry_of
from tinier.progress import bar, say, warn
from tinier.pruning.choice import Choice, choose
from tinier.pruning.cut import Cut
from tinier.pruning.importance import measure_importance
from tinier.pruning.plan import PrunePlan, calibration_windows, prepare
from tinier.pruning.refit import refitted
from tinier.pruning.trial import divergences
from tinier.text import BUILTIN, Document, Text, documents_of


def prune(
    source: Checkpoint,
    plan: PrunePlan,
    out: Path | str,
    *,
    text: Text = BUILTIN,
    device: str = "auto",
) -> Checkpoint:
    """Write `source` without some of its parts to the new folder `out`; returns it opened.

    text: to calibrate on, needed where the plan leaves something to be measured. Raises
    InputError, SchemeError, TextError or OutputError before any work, and MeasuredFailure where no
    sizes fit a target.
    """
    started, out = time.monotonic(), Path(out)
    check_output(out)
    documents = documents_of(text, "calibration")
    stage, windows = prepare(source, plan, documents)
    place = pick_device(device)
    reset_peak_memory(place)
    check_memory(
        stage.memory_bytes, place, f"pruning {source.folder.name}",
        "Use fewer or shorter --windows, or another --device.",
    )  # fmt: skip
    for warning in stage.warnings:
        warn(warning)
    choice = choose(source, plan, windows, place)[0]
    warnings = _warnings(source, plan, choice, documents, place)
    return write_pruned(source, plan, stage, choice, windows, out, warnings, place, started)


def write_pruned(
    source: Checkpoint,
    plan: PrunePlan,
    stage: StagePlan,
    choice: Choice,
    windows: Tensor | None,
    out: Path,
    warnings: list[str],
    device: torch.device,
    started: float,
) -> Checkpoint:
    """Write one choice to the new folder `out`. windows: [n, length] of calibration text."""
    geometry, cut = geometry_of(source), choice.cut
    influence: list[float] = []
    if choice.importance is not None:
        influence = choice.importance.influence.tolist()
    with atomic_folder(out, needed_bytes=stage.output_bytes) as partial:
        writer = TensorWriter(partial)
        written: list[str] = []
        if plan.refit and windows is not None:
            for name, tensor in refitted(source, cut, windows, device):
                renamed = cut.renamed(name, geometry)
                assert renamed is not None
                writer.add(renamed, tensor)
                written.append(name)
        with source.reader() as read, bar("prune", len(source.tensors)) as advance:
            for name in source.tensors:
                renamed = cut.renamed(name, geometry)
                if renamed is not None and name not in written:
                    writer.add(renamed, cut.tensor(name, read(name), geometry))
                advance(1)
        writer.close()
        write_config(partial, cut.config(source.config, geometry))
        copy_side_files(source, partial)
        stage.manifest(
            started=started,
            device=device,
            layers={str(i): {"block_influence": round(s, 6)} for i, s in enumerate(influence)},
            measures={
                "dropped_layers": [i for i in range(geometry.layers) if i not in cut.layers],
                "sizes": asdict(cut.sizes(geometry)),
                "trials": choice.trials,
                "refitted": written,
                "plan": asdict(plan),
            },
            warnings=warnings,
        ).write(partial)
    return open_checkpoint(out)


def _warnings(
    source: Checkpoint,
    plan: PrunePlan,
    choice: Choice,
    documents: Sequence[Document],
    device: torch.device,
) -> list[str]:
    """What is dangerous about the layers that go, and, where a window fits the model, what measurement says
    instead."""
    total = geometry_of(source).layers
    dropped = tuple(i for i in range(total) if i not in choice.cut.layers)
    warnings = []
    critical = sorted({0, 1, total - 1} & set(dropped))
    if critical:
        warnings.append(
            f"dropped layers {critical}: without the first two or the last, models break"
        )
    if 2 * len(dropped) >= total:
        warnings.append(f"dropped {len(dropped)} of {total} layers: half or more rarely recovers")
    shortest = min((w for w in geometry_of(source).windows if w is not None), default=plan.length)
    if warnings and plan.drop_layers and documents and plan.length <= shortest:
        windows = calibration_windows(source, plan, documents)
        warnings.append(_instead(source, dropped, windows, device))
    for warning in warnings:
        say(f"warning: {warning}")
    return warnings


def _instead(
    source: Checkpoint, dropped: tuple[int, ...], windows: Tensor, device: torch.device
) -> str:
    """What the layers that were asked for cost, and what as many others would."""
    total = geometry_of(source).layers
    importance = measure_importance(source, windows, device=device)
    other = importance.least_influential(len(dropped))
    cuts = [
        Cut(layers=tuple(i for i in range(total) if i not in gone)) for gone in (dropped, other)
    ]
    asked, better = divergences(source, windows, cuts, device)
    return (
        f"measured on calibration text, dropping {list(dropped)} costs a divergence of {asked:.2f} "
        f"nats per token, dropping {list(other)} {better:.2f}"
    )
