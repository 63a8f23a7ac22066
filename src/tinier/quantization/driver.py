"""Quantize a checkpoint: folder in, folder out, one linear layer in memory at a time.

Start at `quantize`. Every linear layer of every decoder layer is rounded as the preset says, unless
a pattern leaves it alone; embeddings, head and norms stay as they are. The result is in
compressed-tensors format. Does not choose codes itself: the algorithms are files of their own.
"""

import fnmatch
import math
import re
import time
from dataclasses import asdict
from pathlib import Path

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
    pack_linear,
    quantization_config,
    write_config,
)
from tinier.checkpoint.folder import TensorReader
from tinier.device import pick_device, reset_peak_memory
from tinier.errors import SchemeError
from tinier.families import geometry_of, layer_name
from tinier.numerics import dequantize, snr_db
from tinier.progress import bar
from tinier.quantization.rtn import rtn
from tinier.schemes import Grid, Preset, preset_named

ALGORITHMS = {"rtn": rtn}
CODE = code_digest("numerics", "schemes", "checkpoint", "families", "quantization")
# below this signal-to-noise ratio a layer's weights have lost about a bit more than INT4 costs
_POOR_SNR_DB = 12.0


def plan_quantize(
    source: Checkpoint,
    preset: str,
    *,
    group_size: int | None = None,
    ignore: tuple[str, ...] = (),
) -> StagePlan:
    """What `quantize` would do, after every check that needs no weights.

    Raises SchemeError: an unknown preset, a group size that does not divide, a pattern that matches
    nothing or everything, a source that is already quantized.
    """
    chosen = preset_named(preset, group_size)
    _check_source(source)
    geometry = geometry_of(source)
    names = [f"{layer_name(i)}.{n}" for i in range(geometry.layers) for n in geometry.linears]
    ignored = _matching(names, ignore)
    if len(ignored) == len(names):
        raise SchemeError(f"--ignore {' '.join(ignore)} leaves no layer to quantize.")
    for name in names:
        if name not in ignored:
            inside = name.split(".", 3)[3]
            chosen.scheme.check_fits(name, geometry.linears[inside][1])
    parameters = {
        "preset": preset,
        "scheme": asdict(chosen.scheme),
        "algorithm": chosen.algorithm,
        "ignore": ignored,
    }
    block = quantization_config(chosen.scheme, ["lm_head", *ignored])
    return StagePlan(
        stage="quantize",
        parameters=parameters,
        inputs={"source": source},
        output_config=source.config | {"quantization_config": block},
        output_bytes=_quantized_bytes(source, chosen.scheme.weights, ignored),
        # one shard waits to be written, and the largest tensor is held in float32 a few times
        memory_bytes=min(SHARD_BYTES, source.weight_bytes) + 16 * geometry.vocab * geometry.hidden,
        flops=0.0,
        code=CODE,
    )


def quantize(
    source: Checkpoint,
    preset: str,
    out: Path,
    *,
    group_size: int | None = None,
    ignore: tuple[str, ...] = (),
    device: str = "auto",
) -> Checkpoint:
    """Write `source` quantized as `preset` says to the new folder `out`; returns it opened.

    group_size: input columns per scale, for presets that have groups. ignore: patterns (shell
    style) of layer names to leave in 16 bit. Raises SchemeError or OutputError before any work.
    """
    started = time.monotonic()
    plan = plan_quantize(source, preset, group_size=group_size, ignore=ignore)
    check_output(out)
    chosen = preset_named(preset, group_size)
    ignored = plan.parameters["ignore"]
    place = pick_device(device)
    reset_peak_memory(place)
    with atomic_folder(out, needed_bytes=plan.output_bytes) as partial:
        with source.reader(place) as read:
            layers = _write_tensors(source, read, chosen, set(ignored), partial)
        write_config(partial, plan.output_config)
        copy_side_files(source, partial)
        plan.manifest(
            started=started,
            device=place,
            layers=layers,
            warnings=_warnings(layers, ignored),
        ).write(partial)
    return open_checkpoint(out)


def _quantized_bytes(source: Checkpoint, grid: Grid, ignored: list[str]) -> int:
    """Size on disk that the result will have."""
    geometry = geometry_of(source)
    saved = 0.0
    for i in range(geometry.layers):
        for name, (rows, columns) in geometry.linears.items():
            if f"{layer_name(i)}.{name}" not in ignored:
                groups = columns // grid.group_size if grid.group_size else 1
                stored = rows * columns * grid.bits / 8 + rows * groups * source.dtype.itemsize
                saved += rows * columns * source.dtype.itemsize - stored
    return source.disk_bytes - int(saved)


def _write_tensors(
    source: Checkpoint, read: TensorReader, preset: Preset, ignored: set[str], folder: Path
) -> dict[str, dict[str, float | None]]:
    """Write every tensor, quantized or as it is; returns the error of each quantized layer."""
    algorithm = ALGORITHMS[preset.algorithm]
    writer = TensorWriter(folder)
    layers: dict[str, dict[str, float | None]] = {}
    linears = {
        f"{layer_name(i)}.{name}.weight"
        for i in range(geometry_of(source).layers)
        for name in geometry_of(source).linears
    }
    with bar(f"quantize {preset.scheme.label}", len(source.tensors)) as advance:
        for tensor in sorted(source.tensors, key=_natural):
            weight = read(tensor)
            linear = tensor.removesuffix(".weight")
            if tensor in linears and linear not in ignored:
                quantized = algorithm(weight, preset.scheme.weights, source.dtype)
                rounded = dequantize(quantized, weight.dtype)
                ratio = snr_db(weight, rounded)
                layers[linear] = {"snr_db": round(ratio, 3) if math.isfinite(ratio) else None}
                for name, part in pack_linear(quantized, preset.scheme).items():
                    writer.add(f"{linear}.{name}", part)
            else:
                writer.add(tensor, weight)
            advance(1)
        writer.close()
    return layers


def _check_source(source: Checkpoint) -> None:
    if "quantization_config" in source.config:
        raise SchemeError(
            f"{source.folder} is quantized already. Quantize the 16-bit model that it was made from."
        )


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise SchemeError(
                f"--ignore {pattern!r} matches no layer. Names look like {names[0]}; "
                "use * for any part, such as '*.down_proj'."
            )
        matched.update(hits)
    return sorted(matched, key=_natural)


def _warnings(layers: dict[str, dict[str, float | None]], ignored: list[str]) -> list[str]:
    warnings = [f"left in 16 bit: {name}" for name in ignored]
    for name, measures in layers.items():
        ratio = measures["snr_db"]
        if ratio is not None and ratio < _POOR_SNR_DB:
            warnings.append(f"weights of {name} keep only {ratio} dB of signal over rounding noise")
    return warnings


def _natural(name: str) -> list[str | int]:
    """Sort key that puts layer 2 before layer 10, so that shards hold consecutive layers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
