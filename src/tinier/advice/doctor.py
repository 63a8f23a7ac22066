"""What is wrong with a machine, a checkpoint or a run, from measurements, and what to do.

Start at `examine_machine`, `examine_checkpoint` and `examine_run`. Each gives findings: what was looked at,
what was seen, and, where that is bad, what to type.
"""

import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil
import torch

from tinier.checkpoint import Checkpoint, cache_folder
from tinier.device import free_memory_bytes, pick_device
from tinier.engine import EngineConfig
from tinier.errors import TinierError
from tinier.families import checkpoint_layout, geometry_of, linear_shape
from tinier.families.configuration import hf_config
from tinier.kernels.linear import linear_path
from tinier.kernels.machine import HAS_TRITON, machine_of
from tinier.kernels.native import load_library
from tinier.recipe import RunResults, VariantResult
from tinier.schemes import PRESETS
from tinier.tokenizer import load_tokenizer

Level = Literal["ok", "note", "bad"]

_FREE_DISK = 20e9
# output signal over noise below which a layer is named, in dB below the median of its kind
_POOR_DB = 6.0
_LOW_QUALITY = 0.95


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    what: str
    remedy: str = ""


def examine_machine(device: str = "auto") -> list[Finding]:
    """Driver, fast paths, compiler, memory with cgroup limits, disk, threads."""
    place = pick_device(device)
    return [*_devices(place), *_compilers(place), *_paths(place), *_room(place), *_packages()]


def examine_checkpoint(checkpoint: Checkpoint, device: str = "auto") -> list[Finding]:
    """Memory that serving takes, paths on this device, tokenizer, layers that lost most."""
    place = pick_device(device)
    return [
        *_memory(checkpoint, place), *_speed(checkpoint, place), *_text(checkpoint), *_layers(checkpoint)
    ]  # fmt: skip


def examine_run(results: RunResults) -> list[Finding]:
    """Variants that failed, which step of a chain lost the quality, formats that did not pay."""
    found = [
        Finding("bad", f.variant, f"{f.what} failed: {f.error}",
                "Mend that, and type the same `tinier run` again: the others are kept.")
        for f in results.failed
    ]  # fmt: skip
    for row in results.variants[1:]:
        found += [*_lost(row, results), *_slow(row)]
    return found or [
        Finding("ok", "run", "every variant was made and measured, and none lost much")
    ]


# --- the machine


def _devices(place: torch.device) -> Iterator[Finding]:
    if place.type != "cuda":
        built = torch.version.cuda
        if built and not torch.cuda.is_available():
            yield Finding(
                "bad", "GPU", f"torch is built for CUDA {built} and sees no GPU",
                "Look at nvidia-smi: no driver, an older one than this CUDA needs, or a container without "
                "--gpus all.",
            )  # fmt: skip
        threads, cores = (
            torch.get_num_threads(),
            psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        )
        level: Level = "ok" if threads <= len(os.sched_getaffinity(0)) else "bad"
        yield Finding(
            level, "CPU", f"{cores} cores, {threads} threads of torch",
            "" if level == "ok" else "More threads than this process may use. Set OMP_NUM_THREADS.",
        )  # fmt: skip
        return
    properties = torch.cuda.get_device_properties(place)
    capability = f"{properties.major}.{properties.minor}"
    yield Finding(
        "ok", "GPU", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, capability {capability}, "
        f"torch {torch.__version__} for CUDA {torch.version.cuda}",
    )  # fmt: skip
    if not machine_of(place).runs_triton:
        yield Finding(
            "note", "GPU", "older than Ampere: attention runs in plain torch, without CUDA graphs"
        )


def _compilers(place: torch.device) -> Iterator[Finding]:
    if place.type == "cuda":
        if not HAS_TRITON:
            yield Finding("bad", "Triton", "is not installed: all GPU kernels of tinier need it",
                          "pip install triton")  # fmt: skip
        return
    library = load_library()
    if isinstance(library, str):
        yield Finding("bad", "native step", f"cannot be used: {library}",
                      "Install g++ or clang++, or a wheel of tinier for this machine.")  # fmt: skip
    else:
        yield Finding("ok", "native step", f"compiled, in {cache_folder()}")


def _paths(place: torch.device) -> Iterator[Finding]:
    """Which formats the device multiplies as they are stored."""
    machine, shape = machine_of(place), (4096, 4096)
    fast = [n for n, p in PRESETS.items()
            if linear_path(p.scheme, shape, torch.bfloat16, machine) != "expanded"]  # fmt: skip
    slow = [name for name in PRESETS if name not in fast]
    yield Finding("ok", "formats", f"multiplied as stored: {', '.join(fast) or 'none'}")
    if slow:
        yield Finding("note", "formats", f"expanded to 16 bit at load, so neither smaller in memory nor "
                      f"faster here: {', '.join(slow)}")  # fmt: skip


def _room(place: torch.device) -> Iterator[Finding]:
    free = free_memory_bytes(place)
    whole = psutil.virtual_memory().available
    what = f"{free / 1e9:.1f} GB are free on {place}"
    if place.type == "cpu" and free < 0.95 * whole:
        yield Finding("note", "memory", f"{what}; a control group holds it below the machine's "
                      f"{whole / 1e9:.1f} GB", "Give the container more: docker run --memory.")  # fmt: skip
    else:
        yield Finding("ok", "memory", what)
    for name, folder in (("here", Path.cwd()), ("cache", cache_folder())):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        left = shutil.disk_usage(there).free
        level: Level = "ok" if left > _FREE_DISK else "note"
        yield Finding(
            level, "disk", f"{left / 1e9:.0f} GB are free in {there} ({name})",
            "" if level == "ok" else "A 3B model takes 6.4 GB, and a run several times that.",
        )  # fmt: skip


def _packages() -> Iterator[Finding]:
    for package, named, what in (
        ("datasets", "datasets", "text from the Hub"),
        ("tritonclient", "tritonclient[all]", "Triton's protocols"),
        ("onnxruntime_genai", "onnxruntime-genai onnx onnx-ir", "export to ONNX"),
    ):
        if find_spec(package) is None:
            yield Finding("note", "package", f"{package} is not installed: no {what}",
                          f"pip install {named}")  # fmt: skip


# --- a checkpoint


def _memory(checkpoint: Checkpoint, place: torch.device) -> Iterator[Finding]:
    """What serving takes, and what to lower if there is less."""
    geometry, layout = geometry_of(checkpoint), checkpoint_layout(checkpoint)
    config = EngineConfig()
    length = config.usual_len(geometry)
    grid = layout.kv_cache if layout else None
    item = checkpoint.dtype.itemsize if grid is None else 1
    a_token = geometry.cached_numbers * item
    cache = config.max_batch_size * length * a_token
    weights = checkpoint.weight_bytes
    free = free_memory_bytes(place)
    what = (
        f"weights {weights / 1e9:.2f} GB, KV cache {cache / 1e9:.2f} GB for {config.max_batch_size} "
        f"requests of {length} tokens ({a_token / 1e3:.0f} KB a token); {free / 1e9:.1f} GB are free on "
        f"{place}"
    )
    if weights + cache <= 0.9 * free:
        yield Finding("ok", "memory", what)
        return
    room = 0.9 * free - weights
    if room <= 0:
        share = 0.8 * free / weights
        yield Finding(
            "bad", "memory", f"{what}. The weights alone do not fit",
            f"Make them {1 / max(share, 1e-3):.1f} × smaller: tinier fit MODEL --max-memory "
            f"{0.9 * free / 1e9:.1f}GB, or quantize --preset int4-gptq.",
        )  # fmt: skip
        return
    tokens = int(room / a_token)
    told = [
        f"tinier serve --max-batch-size {max(1, tokens // length)} (requests of {length} tokens)",
        f"--max-seq-len {max(1, tokens // config.max_batch_size)} (for {config.max_batch_size} requests)",
    ]
    if grid is None:
        told.append("quantize with --kv fp8 or int8, which halves the cache")
    yield Finding(
        "bad", "memory", f"{what}. That many full requests do not fit", "; or ".join(told) + "."
    )


def _speed(checkpoint: Checkpoint, place: torch.device) -> Iterator[Finding]:
    layout, machine = checkpoint_layout(checkpoint), machine_of(place)
    if layout is None:
        yield Finding("note", "speed", "16-bit weights: each token reads all of them",
                      "tinier quantize, or tinier advise for what suits this device.")  # fmt: skip
        return
    geometry = geometry_of(checkpoint)
    slow = sorted({
        scheme.label for name, scheme in layout.schemes.items()
        if linear_path(scheme, linear_shape(geometry, name), checkpoint.dtype, machine) == "expanded"
    })  # fmt: skip
    if slow:
        yield Finding(
            "bad", "speed", f"{', '.join(slow)} is expanded to 16 bit on {place}: no faster than the base",
            "tinier doctor without an argument lists what this device multiplies: use one of those.",
        )  # fmt: skip
    else:
        yield Finding("ok", "speed", f"{layout.label}: multiplied as stored on {place}")
    weight_only = all(scheme.activations is None for scheme in layout.schemes.values())
    if weight_only and place.type == "cuda":
        yield Finding("note", "speed", "weight-only formats pay while decoding reads weights: with tens "
                      "of requests at once products take the time, and 8-bit inputs pay more")  # fmt: skip


def _text(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tokenizer, BOS and template, which quietly cost quality where they are wrong."""
    try:
        tokenizer = load_tokenizer(checkpoint)
    except TinierError as error:
        yield Finding("bad", "tokenizer", str(error), "Copy the original model's tokenizer files.")
        return
    config = hf_config(checkpoint)
    bos = getattr(config, "bos_token_id", None)
    if tokenizer.bos_token_id is not None and bos not in (None, tokenizer.bos_token_id):
        yield Finding("bad", "tokenizer", f"BOS is {tokenizer.bos_token_id} in the tokenizer and {bos} in "
                      "config.json", "Take both files from the original model.")  # fmt: skip
    if not tokenizer.has_template:
        yield Finding("note", "chat template", "there is none: /v1/chat/completions is refused",
                      "Use /v1/completions, or copy the instruct model's chat_template.jinja.")  # fmt: skip
        return
    text = tokenizer.chat([{"role": "user", "content": "a"}], opens_reply=True)
    start = tokenizer.bos_token
    if start and tokenizer.prefix and text.startswith(start):
        yield Finding("ok", "chat template", f"begins with {start}; tinier adds no second one")
    else:
        yield Finding("ok", "chat template", "is there")


def _layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The layers that lost most, and what the stage warned about."""
    manifest = checkpoint.manifest
    if manifest is None:
        return
    for warning in manifest.warnings:
        yield Finding("note", manifest.stage, warning)
    kinds: dict[str, dict[str, float]] = {}
    for name, measures in manifest.layers.items():
        value = measures.get("output_snr_db", measures.get("snr_db"))
        parts = name.split(".", 3)
        if value is not None and len(parts) == 4:
            kinds.setdefault(parts[3], {})[name] = value
    poor = {
        name: (value, middle) for values in kinds.values() if (middle := statistics.median(values.values()))
        for name, value in values.items() if value < middle - _POOR_DB
    }  # fmt: skip
    if not poor:
        if kinds:
            yield Finding("ok", "layers", "no layer lost much more than others of its kind")
        return
    worst = sorted(poor, key=lambda name: poor[name][0] - poor[name][1])[:4]
    told = ", ".join(f"{name} {poor[name][0]:.0f} dB (usual {poor[name][1]:.0f})" for name in worst)
    yield Finding(
        "note", "layers", f"{len(poor)} keep less of their signal than others of their kind: {told}",
        "Leave them in more bits: --ignore NAME, layer_formats in a recipe, or --preset mixed, which finds "
        "them; more calibration text like what the model is for (--text).",
    )  # fmt: skip


# --- a run


def _lost(row: VariantResult, results: RunResults) -> Iterator[Finding]:
    """Where quality is low: which step of the chain lost it."""
    if row.retained_quality >= _LOW_QUALITY:
        return
    steps, after = [], row
    while after.from_ is not None and (before := results.variant(after.from_)) is not None:
        lost = before.retained_quality - after.retained_quality
        steps.append((lost, after.stage or "", after.name))
        after = before
    if not steps:  # what it was made from failed
        return
    lost, stage, where = max(steps)
    level: Level = "bad" if row.collapsed else "note"
    remedy = {
        "prune": "Remove less (--keep-layers 88%), choose layers by --method loss, heal: tinier distill.",
        "quantize": "More bits or smaller groups, --preset mixed or int4-best, more calibration text like "
        "what the model is for, or train on the grid (distill: quantize).",
        "distill": "Fewer steps or a lower learning rate: training made it worse.",
    }.get(stage, "")
    yield Finding(
        level, row.name, f"keeps {100 * row.retained_quality:.1f} % quality; {stage} in {where} lost "
        f"{100 * lost:.1f} points of it", remedy,
    )  # fmt: skip


def _slow(row: VariantResult) -> Iterator[Finding]:
    for note in row.notes:
        yield Finding(
            "bad",
            row.name,
            note,
            "Quantize to a format that this device multiplies: tinier doctor.",
        )
    if row.stage == "quantize" and row.speedup < 1 and not row.notes:
        many = row.speed[-1].workload.concurrency
        yield Finding(
            "note", row.name, f"is {row.speedup:.2f} × the base's speed with {many} at once",
            "A weight-only format pays at small batches; at this one use INT8 or FP8 with rounded inputs.",
        )  # fmt: skip
