"""Write a checkpoint as another engine reads it, and check that it is the same model.

Start at `export`. One layer is in memory at a time; a run that was stopped goes on where it was when the
same is asked for again.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinier.checkpoint import (
    Checkpoint,
    Manifest,
    PartFiles,
    StagePlan,
    TensorReader,
    code_digest,
    copy_side_files,
    new_file,
    pack_linear,
    quantization_config,
    resumable_folder,
    unpack_linear,
    write_atomically,
    write_config,
)
from tinier.device import pick_device, reset_peak_memory
from tinier.errors import InputError, MeasuredFailure, SchemeError
from tinier.export.check import likeness
from tinier.export.gguf_model import MOST_APART, read_back, write_gguf
from tinier.export.ollama import modelfile
from tinier.export.targets import TARGETS, refusal
from tinier.families import checkpoint_layout, geometry_of, layer_name, module_names, open_model
from tinier.progress import bar, warn
from tinier.schemes import Layout


def plan_export(source: Checkpoint, to: str) -> StagePlan:
    """What `export` would do. Raises InputError for an unknown target, SchemeError for a checkpoint that it
    cannot read: why, and which preset would work."""
    if to not in TARGETS:
        raise InputError(f"--to {to} is not known. Targets: {', '.join(TARGETS)}.")
    reason = refusal(source, to)
    if reason is not None:
        raise SchemeError(f"{source.folder} cannot go to {to}: {reason}")
    config = dict(source.config)
    layout = _target_layout(source, to)
    if layout is not None and TARGETS[to].storage is not None:
        config["quantization_config"] = quantization_config(
            layout, module_names(geometry_of(source))
        )
    return StagePlan(
        stage="export",
        parameters={"to": to},
        inputs={"source": source},
        output_config=config,
        output_bytes=source.disk_bytes,
        memory_bytes=2 * source.weight_bytes // geometry_of(source).layers,
        flops=0.0,
        code=code_digest("tinier.export.driver"),
    )


def export(source: Checkpoint, to: str, out: Path, *, device: str = "cpu") -> Manifest:
    """Write `source` to the new folder `out` as the target reads it, and compare what was written with it:
    logits, or the numbers of each tensor of a GGUF file. Returns what was measured.

    Raises what `plan_export` raises, OutputError, and MeasuredFailure where the export is another model:
    then nothing is left.
    """
    started, place = time.monotonic(), pick_device(device)
    stage = plan_export(source, to)
    for warning in stage.all_warnings:
        warn(warning)
    reset_peak_memory(place)
    with resumable_folder(out, stage.key, needed_bytes=stage.output_bytes) as folder:
        try:
            if TARGETS[to].storage is None:
                measures = _write_file(source, to, folder)
            else:
                measures = _write_folder(source, to, stage, folder, place)
        except MeasuredFailure:
            shutil.rmtree(folder)
            raise
        manifest = stage.manifest(started=started, device=place, measures=measures)
        manifest.write(folder)
    return manifest


def _write_folder(
    source: Checkpoint, to: str, stage: StagePlan, folder: Path, device: torch.device
) -> dict[str, float]:
    _write_tensors(source, _target_layout(source, to), folder)
    write_config(folder, stage.output_config)
    copy_side_files(source, folder)
    for name, text in TARGETS[to].files(stage.output_config).items():
        write_atomically(folder / name, text)
    found = likeness(source, open_model(folder), device)
    if not found.is_same:
        raise MeasuredFailure(
            f"the export would be another model than {source.folder}: KL {found.kl:.2e} nats per token, "
            f"top-1 agreement {100 * found.top_1:.2f} %. Nothing was written. This is a fault of tinier: "
            "report it."
        )
    return {"kl": found.kl, "top_1": found.top_1, "tokens": found.tokens}


def _write_file(source: Checkpoint, to: str, folder: Path) -> dict[str, float]:
    path = folder / "model.gguf"
    with new_file(path) as partial:
        write_gguf(source, partial)
    apart = read_back(source, path)
    if apart > MOST_APART:
        raise MeasuredFailure(
            f"the export would be another model than {source.folder}: a tensor differs by {apart:.2e} of "
            "its norm. Nothing was written. This is a fault of tinier: report it."
        )
    if to == "ollama":
        write_atomically(folder / "Modelfile", modelfile(source))
    return {"largest_difference": apart}


def _target_layout(source: Checkpoint, to: str) -> Layout | None:
    """How the export stores the layers; None: in 16 bit."""
    layout, storage = checkpoint_layout(source), TARGETS[to].storage
    return layout if layout is None or storage is None else replace(layout, storage=storage)


def _write_tensors(source: Checkpoint, layout: Layout | None, folder: Path) -> None:
    """All weights, a file a layer; what a stopped run has written stays."""
    geometry = geometry_of(source)
    parts = PartFiles(folder, geometry.layers + 1)
    prefixes = [f"{layer_name(i)}." for i in range(geometry.layers)]
    with bar("export", len(prefixes) + 1) as advance:
        for index in range(len(prefixes) + 1):
            if not parts.has(index):
                names = [name for name in source.tensors if _part_of(name, prefixes) == index]
                with source.reader() as read:  # one for each part: an open file keeps what was read
                    parts.write(index, _tensors(source, layout, names, read), {})
            advance(1)
    parts.close()


def _part_of(name: str, prefixes: list[str]) -> int:
    """The layer of a tensor; what is around the layers comes last."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else len(prefixes)


def _tensors(
    source: Checkpoint, layout: Layout | None, names: list[str], read: TensorReader
) -> dict[str, Tensor]:
    """Some tensors of a checkpoint as the target has them."""
    stored = checkpoint_layout(source)
    linears = dict.fromkeys(name.rpartition(".")[0] for name in names)
    written: dict[str, Tensor] = {}
    for linear in linears:
        own = [name for name in names if name.rpartition(".")[0] == linear]
        scheme = stored.schemes.get(linear) if stored else None
        if scheme is None or layout is None or stored is None or layout.storage == stored.storage:
            written |= {_name_there(name, layout): read(name) for name in own}
            continue
        codes, input_scale = unpack_linear(source.optional(read), linear, scheme, stored.storage)
        parts = pack_linear(codes, scheme, input_scale, layout.storage)
        written |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
        if f"{linear}.bias" in own:
            written[f"{linear}.bias"] = read(f"{linear}.bias")
    return written


def _name_there(name: str, layout: Layout | None) -> str:
    """ModelOpt has the cache's scales in the layers that write it."""
    attention, _, last = name.rpartition(".")
    if layout is None or layout.storage != "modelopt" or last not in ("k_scale", "v_scale"):
        return name
    return f"{attention}.{last[0]}_proj.{last}"
