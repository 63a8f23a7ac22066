"""Write a checkpoint as another engine reads it, and check that it is the same model.

Start at `export`. One layer is in memory at a time; a run that was stopped goes on where it was when the
same is asked for again.
"""

import re
import shutil
import time
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
    resumable_folder,
    unpack_linear,
    write_atomically,
    write_config,
)
from tinier.checkpoint.modelopt import modelopt_name
from tinier.device import pick_device, reset_peak_memory
from tinier.errors import InputError, MeasuredFailure
from tinier.exporting.check import (
    CHECKED_TOKENS,
    MOST_ROUNDED,
    Likeness,
    graph_likeness,
    likeness,
    most_apart,
)
from tinier.exporting.gguf_model import MOST_APART, read_back, write_gguf
from tinier.exporting.gguf_tokenizer import read_tokenizer
from tinier.exporting.ollama import modelfile
from tinier.exporting.onnx import build, check_builder
from tinier.exporting.targets import TARGETS, target_config, target_layout
from tinier.exporting.triton import weights_folder
from tinier.families import Geometry, checkpoint_layout, geometry_of, open_model
from tinier.numerics import dequantize
from tinier.progress import bar, warn
from tinier.schemes import HEAD_LINEAR, Layout


def plan_export(source: Checkpoint, to: str) -> StagePlan:
    """What `export` would do. Raises InputError for an unknown target, SchemeError for a checkpoint that it
    cannot read: why, and which preset would work."""
    if to not in TARGETS:
        raise InputError(f"--to {to} is not known. Targets: {', '.join(TARGETS)}.")
    config = target_config(source, to)
    if TARGETS[to].writes == "gguf":
        read_tokenizer(source)  # what it refuses is known before the work
    return StagePlan(
        stage="export",
        parameters={"to": to},
        inputs={"source": source},
        output_config=config,
        output_bytes=2 * geometry_of(source).parameters if to == "16bit" else source.disk_bytes,
        memory_bytes=_memory_bytes(geometry_of(source), to),
        flops=0.0,
        code=code_digest("tinier.exporting.driver"),
    )


def export(source: Checkpoint, to: str, out: Path | str, *, device: str = "cpu") -> Manifest:
    """Write `source` to the new folder `out` as the target reads it, and compare what was written with it:
    logits, or the numbers of each tensor of a GGUF file. Returns what was measured.

    Raises what `plan_export` raises, OutputError, and MeasuredFailure where the export is another model:
    then nothing is left.
    """
    out = Path(out)
    started, place = time.monotonic(), pick_device(device)
    stage, target = plan_export(source, to), TARGETS[to]
    if target.writes == "onnx":
        check_builder()
    for warning in stage.all_warnings:
        warn(warning)
    reset_peak_memory(place)
    with resumable_folder(out, stage.key, needed_bytes=stage.output_bytes) as folder:
        try:
            if target.writes == "gguf":
                measures = _write_file(source, to, folder)
            elif target.writes == "onnx":
                measures = _write_graph(source, stage, folder, place)
            elif target.repository is not None:
                name = re.sub(r"[^A-Za-z0-9_.-]", "-", out.name)
                _write_texts(folder, target.repository(name))
                weights = folder / weights_folder(name)
                measures = _write_folder(source, stage, weights, place)
            else:
                measures = _write_folder(source, stage, folder, place)
        except MeasuredFailure:
            shutil.rmtree(folder)
            raise
        manifest = stage.manifest(started=started, device=place, measures=measures)
        manifest.write(folder)
    return manifest


def _write_folder(
    source: Checkpoint, stage: StagePlan, folder: Path, device: torch.device
) -> dict[str, float]:
    to = stage.parameters["to"]
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(source, target_layout(source, to), folder)
    write_config(folder, stage.output_config)
    copy_side_files(source, folder)
    _write_texts(folder, TARGETS[to].files(stage.output_config))
    made = open_model(folder)
    if to == "16bit":
        return {"largest_difference": _small(source, most_apart(source, made), MOST_ROUNDED)}
    return _same(source, likeness(source, made, device))


def _write_graph(
    source: Checkpoint, stage: StagePlan, folder: Path, device: torch.device
) -> dict[str, float]:
    gptq = folder / ".gptq"
    _write_folder(source, stage, gptq, device)
    build(gptq, folder, tied=bool(source.config["tie_word_embeddings"]))
    shutil.rmtree(gptq)
    return _same(source, graph_likeness(source, folder, device))


def _write_texts(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, text)


def _same(source: Checkpoint, found: Likeness) -> dict[str, float]:
    """What is kept of a comparison of logits. Raises MeasuredFailure where they differ."""
    if not found.is_same:
        raise MeasuredFailure(
            f"the export would be another model than {source.folder}: KL {found.kl:.2e} nats per token, "
            f"top-1 agreement {100 * found.top_1:.2f} %. Nothing was written. This is a fault of tinier: "
            "report it."
        )
    return {"kl": found.kl, "top_1": found.top_1, "tokens": found.tokens}


def _small(source: Checkpoint, apart: float, most: float) -> float:
    """A tensor's largest difference, as it is. Raises MeasuredFailure where it is not small."""
    if apart > most:
        raise MeasuredFailure(
            f"the export would be another model than {source.folder}: a tensor differs by {apart:.2e} of "
            "its norm. Nothing was written. This is a fault of tinier: report it."
        )
    return apart


def _write_file(source: Checkpoint, to: str, folder: Path) -> dict[str, float]:
    path = folder / "model.gguf"
    with new_file(path) as partial:
        write_gguf(source, partial)
    apart = _small(source, read_back(source, path), MOST_APART)
    if to == "ollama":
        write_atomically(folder / "Modelfile", modelfile(source))
    return {"largest_difference": apart}


def _memory_bytes(geometry: Geometry, to: str) -> int:
    """What an embedding takes while it is packed and compared: with the tokens and merges of a GGUF file as
    Python's objects (470 MB were seen on SmolLM2, for 429 here), or with two layers and the logits of a
    folder in float32 (420 MB, for 406). ONNX Runtime's builder holds all layers as codes and the table in
    float32, some of it several times (580 MB, for 658)."""
    table = geometry.vocab * geometry.hidden
    if TARGETS[to].writes == "gguf":
        return 3 * table + 7_000 * geometry.vocab
    layer = sum(rows * columns for rows, columns in geometry.linears.values())
    if TARGETS[to].writes == "onnx":
        return 3 * (geometry.layers * layer + 4 * table)
    return 8 * (table + layer) + 12 * CHECKED_TOKENS * geometry.vocab


def _write_tensors(source: Checkpoint, layout: Layout | None, folder: Path) -> None:
    """All weights, a file a layer, and one of what is around them; what a stopped run has written stays."""
    layers = geometry_of(source).layers
    parts = PartFiles(folder, layers + 1)
    names: list[list[str]] = [[] for _ in range(layers + 1)]
    for name in source.tensors:
        names[int(name.split(".")[2]) if name.startswith("model.layers.") else layers].append(name)
    with bar("export", layers + 1) as advance:
        for index in range(layers + 1):
            if not parts.has(index):
                with source.reader() as read:  # one for each part: an open file keeps what was read
                    parts.write(index, _tensors(source, layout, names[index], read), {})
            advance(1)
    parts.close()


def _tensors(
    source: Checkpoint, layout: Layout | None, names: list[str], read: TensorReader
) -> dict[str, Tensor]:
    """Some tensors of a checkpoint as the target has them."""
    stored = checkpoint_layout(source)
    if stored is None or (layout is not None and layout.storage == stored.storage):
        return {_name_there(name, layout): read(name) for name in names}
    written: dict[str, Tensor] = {}
    for name in names:
        linear, _, part = name.rpartition(".")
        is_plain = stored.schemes.get(linear) is None or part == "bias"
        if is_plain and not (layout is None and part in ("k_scale", "v_scale")):
            written[_name_there(name, layout)] = read(name)
    for linear in dict.fromkeys(name.rpartition(".")[0] for name in names):
        scheme = stored.schemes.get(linear)
        if scheme is None:
            continue
        if layout is None and linear == HEAD_LINEAR and geometry_of(source).tied_head:
            continue  # its scales are the embedding's
        codes, input_scale = unpack_linear(source.optional(read), linear, scheme, stored.storage)
        if layout is None:
            written[f"{linear}.weight"] = dequantize(codes, torch.float32).to(source.dtype)
        else:
            parts = pack_linear(codes, scheme, input_scale, layout.storage)
            written |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
    return written


def _name_there(name: str, layout: Layout | None) -> str:
    return modelopt_name(name) if layout is not None and layout.storage == "modelopt" else name
