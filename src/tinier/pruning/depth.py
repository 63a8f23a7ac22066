"""Depth pruning: remove whole decoder layers. Folder in, folder out.

Start at `prune`. Layers are given by number, or as a share or count to be chosen by block influence
on calibration text. The result is a plain model of the same architecture with fewer layers, in
standard format, which needs nothing of ours to load.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tinier.calibration import check_attention_window
from tinier.checkpoint import (
    SHARD_BYTES,
    Checkpoint,
    StagePlan,
    TensorWriter,
    atomic_folder,
    check_output,
    code_digest,
    copy_side_files,
    open_checkpoint,
    write_config,
)
from tinier.device import pick_device, reset_peak_memory
from tinier.errors import InputError, SchemeError
from tinier.families import check_length, geometry_of
from tinier.progress import bar
from tinier.pruning.importance import block_influence
from tinier.text import load_tokenizer, tensor_sha256, token_windows

CODE = code_digest("checkpoint", "families", "text", "calibration", "pruning")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# entries of config.json that have one element per layer
_PER_LAYER_KEYS = ("layer_types",)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    drop_layers: tuple[int, ...] = ()
    """Layers to remove, counted from 0."""
    layers: int | str | None = None
    """How many layers to remove, or a share such as `25%`; which ones is measured."""
    sequences: int = 16
    """Calibration windows."""
    length: int = 512
    """Tokens in one calibration window."""


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
        numbers += range(first, last + 1)
    return tuple(sorted(set(numbers)))


def plan_prune(source: Checkpoint, plan: PrunePlan, documents: Sequence[str] = ()) -> StagePlan:
    """What `prune` would do, after every check that needs no weights.

    Raises InputError: neither or both ways to choose, a layer out of range, all layers;
    SchemeError for a quantized source; TextError for a text that cannot be used.
    """
    if "quantization_config" in source.config:
        raise SchemeError(f"{source.folder} is quantized. Prune first, then quantize the result.")
    geometry = geometry_of(source)
    total = geometry.layers
    if bool(plan.drop_layers) == (plan.layers is not None):
        raise InputError("give either --drop-layers 21-27 (which) or --layers 25% (how many).")
    if plan.drop_layers:
        outside = [layer for layer in plan.drop_layers if not 0 <= layer < total]
        if outside:
            raise InputError(
                f"layers {outside} do not exist: {source.folder.name} has layers 0 to {total - 1}."
            )
        count = len(plan.drop_layers)
    else:
        count = _count(plan.layers, total)
    if count >= total:
        raise InputError(
            f"dropping {count} of {total} layers leaves none. Drop at most {total - 1}."
        )
    parameters: dict[str, Any] = {"count": count, "drop_layers": list(plan.drop_layers)}
    if not plan.drop_layers:
        # which layers go is an outcome; these decide it
        check_length(source, plan.length)
        check_attention_window(source, plan.length)
        windows = _calibration_windows(source, plan, documents)
        parameters |= {"sequences": len(windows), "length": plan.length}
        parameters["windows_sha256"] = tensor_sha256(windows)
    return StagePlan(
        stage="prune",
        parameters=parameters,
        inputs={"source": source},
        # which layers go may be open still, and changes nothing but per-layer lists
        output_config=_pruned_config(source.config, set(plan.drop_layers or range(count)), total),
        output_bytes=_pruned_bytes(source, count),
        memory_bytes=min(SHARD_BYTES, source.weight_bytes)
        + 4 * geometry.layer_parameters
        + 4 * plan.sequences * plan.length * geometry.hidden,
        flops=0.0 if plan.drop_layers else 2.0 * geometry.parameters * plan.sequences * plan.length,
        code=CODE,
    )


def prune(
    source: Checkpoint,
    plan: PrunePlan,
    out: Path,
    *,
    documents: Sequence[str] = (),
    device: str = "auto",
) -> Checkpoint:
    """Write `source` without some of its layers to the new folder `out`; returns it opened.

    documents: calibration text, needed where the plan leaves the choice of layers open. Raises
    InputError, SchemeError, TextError or OutputError before any work.
    """
    started = time.monotonic()
    check_output(out)
    stage = plan_prune(source, plan, documents)
    place = pick_device(device)
    reset_peak_memory(place)
    scores: list[float] = []
    dropped = list(plan.drop_layers)
    if not dropped:
        windows = _calibration_windows(source, plan, documents)
        scores = block_influence(source, windows, device=place)
        dropped = least_influential(scores, stage.parameters["count"])
    total = geometry_of(source).layers
    with atomic_folder(out, needed_bytes=stage.output_bytes) as partial:
        _write_kept(source, set(dropped), partial)
        write_config(partial, _pruned_config(source.config, set(dropped), total))
        copy_side_files(source, partial)
        stage.manifest(
            started=started,
            device=place,
            layers={str(i): {"block_influence": round(s, 6)} for i, s in enumerate(scores)},
            measures={"dropped_layers": dropped, "plan": asdict(plan)},
            warnings=_warnings(dropped, total),
        ).write(partial)
    return open_checkpoint(out)


def least_influential(scores: list[float], count: int) -> list[int]:
    """The `count` layers of lowest influence, in order; never the first two or the last.

    Those three read the embedding and write for the head: their removal breaks a model whatever
    their score (arXiv 2403.17887, 2408.11796). They are candidates only when nothing else is left.
    """
    protected = {0, 1, len(scores) - 1}
    ranked = sorted(range(len(scores)), key=lambda layer: (layer in protected, scores[layer]))
    return sorted(ranked[:count])


def _pruned_bytes(source: Checkpoint, count: int) -> int:
    """Size on disk of `source` without `count` layers."""
    geometry = geometry_of(source)
    layer = geometry.layer_parameters * source.dtype.itemsize
    return source.disk_bytes - count * layer


def _count(layers: int | str | None, total: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(layers))
    if match is None or (not match[2] and "." in match[1]):
        raise InputError(f"layers={layers!r} is no count and no share. Use 7 or 25%.")
    # a share is rounded down: 25 % of 30 layers is 7
    count = int(total * float(match[1]) / 100) if match[2] else int(match[1])
    if count < 1:
        raise InputError(f"layers={layers!r} of {total} layers drops none. Use a larger share.")
    return count


def _calibration_windows(source: Checkpoint, plan: PrunePlan, documents: Sequence[str]) -> Tensor:
    tokenizer = load_tokenizer(source)
    return token_windows(tokenizer, documents, length=plan.length, count=plan.sequences)


def _write_kept(source: Checkpoint, dropped: set[int], folder: Path) -> None:
    kept = [i for i in range(geometry_of(source).layers) if i not in dropped]
    renumbered = {old: new for new, old in enumerate(kept)}
    writer = TensorWriter(folder)
    with source.reader() as read, bar("prune", len(source.tensors)) as advance:
        for name in source.tensors:
            match = _LAYER.fullmatch(name)
            if match is None:
                writer.add(name, read(name))
            elif int(match[1]) in renumbered:
                writer.add(f"model.layers.{renumbered[int(match[1])]}.{match[2]}", read(name))
            advance(1)
        writer.close()


def _pruned_config(config: dict[str, Any], dropped: set[int], total: int) -> dict[str, Any]:
    pruned = config | {"num_hidden_layers": total - len(dropped)}
    for key in _PER_LAYER_KEYS:
        if config.get(key):
            pruned[key] = [value for i, value in enumerate(config[key]) if i not in dropped]
    if config.get("max_window_layers") is not None:  # Qwen: full attention up to this layer
        boundary = config["max_window_layers"]
        pruned["max_window_layers"] = boundary - sum(layer < boundary for layer in dropped)
    return pruned


def _warnings(dropped: list[int], total: int) -> list[str]:
    warnings = []
    critical = sorted({0, 1, total - 1} & set(dropped))
    if critical:
        warnings.append(
            f"dropped layers {critical}: without the first two or the last, models break"
        )
    if 2 * len(dropped) >= total:
        warnings.append(f"dropped {len(dropped)} of {total} layers: half or more rarely recovers")
    return warnings
