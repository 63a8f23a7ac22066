"""Which chain for which use: the guide's tables of selection and strategy, as a function.

Start at `advise`. For a use, a device and a load, chains of stages are ranked: what each would take in
bytes and milliseconds (estimates, from the model's shape and the device's bandwidth and arithmetic), why it
suits, and the commands. `advise_from_run` ranks what a run measured instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tinier.advice.hardware import Hardware
from tinier.benchmark import Workload
from tinier.checkpoint import Checkpoint
from tinier.errors import InputError, SchemeError
from tinier.families import geometry_of
from tinier.quantization import QuantizePlan
from tinier.quantization.plan import average_bits, chosen_presets
from tinier.recipe import RunResults

Use = Literal["cloud", "edge", "real-time", "batch", "mobile"]
USES: tuple[Use, ...] = get_args(Use)

# What each use is after, in the guide's words: throughput, size or latency
_AIMS: dict[Use, Literal["throughput", "size", "latency"]] = {
    "cloud": "throughput", "batch": "throughput", "edge": "size", "mobile": "size", "real-time": "latency",
}  # fmt: skip
# uses whose embedding is stored in 8 bits, too
_SMALL: tuple[Use, ...] = ("edge", "mobile")
# rough shares of device bandwidth and arithmetic that decoding and prompts reach: for ranking, not measured
_BANDWIDTH_SHARE, _FLOPS_SHARE = 0.65, 0.5
# of a GPU's memory that is left for weights and cache
_USABLE = 0.9


class _Chain(NamedTuple):
    """One way to compress."""

    name: str
    preset: str | None
    kept_layers: float
    """Share of the layers that stay"""
    quality: float
    """Retained quality on SmolLM2: measured for FP8, INT8, INT4 (README, peers' tables) and for the pruned
    INT4 (demo); guessed for NVFP4 and for the pruned FP8 and INT8, from the healed 16-bit model's 0.69"""
    needs: Callable[[Hardware], str | None]
    """Why a device gains nothing from it; None: it does"""


def _native(_: Hardware) -> str | None:
    return None


def _fp8(device: Hardware) -> str | None:
    if device.is_cpu or device.has_fp8:
        return None
    return f"{device.name} has no FP8 arithmetic (it needs Ada or Hopper): weights are expanded to 16 bit"


def _fp4(device: Hardware) -> str | None:
    if device.has_fp4:
        return None
    return f"{device.name} has no FP4 arithmetic (it needs Blackwell)"


def _int4(device: Hardware) -> str | None:
    if device.is_cpu or device.runs_triton:
        return None
    return f"{device.name} is older than Ampere: INT4 weights are expanded to 16 bit in this engine"


_CHAINS = (
    _Chain("FP8", "fp8", 1.0, 0.979, _fp8),
    _Chain("INT8 SmoothQuant", "int8-sq", 1.0, 0.991, _native),
    _Chain("INT4 GPTQ", "int4-gptq", 1.0, 0.889, _int4),
    _Chain("NVFP4", "nvfp4", 1.0, 0.85, _fp4),
    _Chain("a quarter of the layers pruned, healed, FP8", "fp8", 0.75, 0.68, _fp8),
    _Chain("a quarter of the layers pruned, healed, INT8", "int8-sq", 0.75, 0.69, _native),
    _Chain("a quarter of the layers pruned, healed, INT4", "int4-gptq", 0.75, 0.66, _int4),
    _Chain("16 bit, as it is", None, 1.0, 1.0, _native),
)


@dataclass(frozen=True)
class Advice:
    """One chain for the use."""

    chain: str
    reason: str
    weight_bytes: float
    memory_bytes: float
    """Weights, and the KV cache of the load"""
    latency_ms: float
    """Between two tokens, estimated"""
    throughput: float
    """Output tokens a second under the load, estimated"""
    speedup: float
    """Over 16 bit"""
    quality: float | None
    """Retained quality: measured in the run, or on SmolLM2"""
    against: tuple[str, ...]
    """What speaks against it"""
    commands: tuple[str, ...]


def advise(
    source: Checkpoint, model: str, use: Use, device: Hardware, load: Workload, floor: float | None
) -> list[Advice]:
    """Chains for a use, the best first. floor: retained quality, 0 to 1, that must be left.

    Raises InputError for a use that is none.
    """
    if use not in USES:
        raise InputError(f"use {use!r} is not known. Use {', '.join(USES)}.")
    plain = _estimate(source, _CHAINS[-1], device, load, use)
    found = [_advice(source, model, chain, use, device, load, floor, plain) for chain in _CHAINS]
    return sorted(found, key=lambda a: (len(a.against), _rank(a, use)))


def advise_from_run(
    results: RunResults, folder: Path, use: Use, floor: float | None
) -> list[Advice]:
    """The own variants of the run in `folder` for a use, the best first, with what was measured."""
    if use not in USES:
        raise InputError(f"use {use!r} is not known. Use {', '.join(USES)}.")
    found = []
    for row in results.variants:
        speed = row.speed[-1]
        found.append(
            Advice(
                chain=f"{row.name} ({row.precision}, {row.layers} layers)",
                reason="measured in this run", weight_bytes=row.weight_bytes,
                memory_bytes=row.memory.weights_bytes + row.memory.kv_bytes,
                latency_ms=speed.itl_ms.median,
                throughput=speed.output_tokens_per_s.median, speedup=row.speedup,
                quality=row.retained_quality,
                against=(*_too_low(row.retained_quality, floor), *row.notes),
                commands=(f"tinier serve {folder / row.checkpoint}",),
            )
        )  # fmt: skip
    return sorted(found, key=lambda a: (len(a.against), _rank(a, use)))


def _rank(advice: Advice, use: Use) -> float:
    """Less is better: what the use is after, with quality counted as it is in the three choices."""
    quality = max(1e-6, advice.quality or 0.0)
    aim = _AIMS[use]
    if aim == "size":
        return advice.memory_bytes / quality**2
    if aim == "latency":
        return advice.latency_ms / quality
    return 1 / (advice.throughput * quality)


def _too_low(quality: float, floor: float | None) -> list[str]:
    if floor is None or quality >= floor:
        return []
    return [f"keeps {100 * quality:.1f} % quality, below the floor of {100 * floor:.0f} %"]


def _advice(
    source: Checkpoint, model: str, chain: _Chain, use: Use, device: Hardware, load: Workload,
    floor: float | None, plain: "_Estimate",
) -> Advice:  # fmt: skip
    found = _estimate(source, chain, device, load, use)
    against = _too_low(chain.quality, floor)
    lack = chain.needs(device)
    if lack is not None:
        against.append(lack)
    if found.memory > _USABLE * device.memory_gb * 1e9:
        against.append(f"takes {found.memory / 1e9:.1f} GB of {device.memory_gb:.0f} GB")
    return Advice(
        chain=chain.name,
        reason=_reason(chain, use, plain, found),
        weight_bytes=found.weights,
        memory_bytes=found.memory,
        latency_ms=found.step_ms,
        throughput=found.throughput,
        speedup=found.throughput / plain.throughput,
        quality=chain.quality,
        against=tuple(against),
        commands=_commands(model, chain, use, found.group_size),
    )


class _Estimate(NamedTuple):
    weights: float
    memory: float
    step_ms: float
    throughput: float
    group_size: int | None


def _estimate(
    source: Checkpoint, chain: _Chain, device: Hardware, load: Workload, use: Use
) -> _Estimate:
    geometry, dtype = geometry_of(source), source.dtype
    layers = max(1, round(geometry.layers * chain.kept_layers))
    linear = geometry.layers * sum(rows * columns for rows, columns in geometry.linears.values())
    edges = geometry.parameters - linear
    bits, group = 8.0 * dtype.itemsize, None
    if chain.preset is not None:
        bits, group = _bits(source, chain.preset)
    stored = linear * layers / geometry.layers * bits / 8
    read = (
        stored
        if chain.needs(device) is None
        else linear * layers / geometry.layers * dtype.itemsize
    )
    # as `_commands` stores the embedding
    item = 1 if chain.preset is not None and use in _SMALL else dtype.itemsize
    weights, loaded = (float(n + edges * item) for n in (stored, read))
    tokens = load.input_length + load.output_length
    cache = (
        load.concurrency
        * tokens
        * geometry.cached_numbers
        * layers
        / geometry.layers
        * dtype.itemsize
    )
    moved = loaded + cache / 2
    flops = 2.0 * (linear * layers / geometry.layers + edges)
    speed = device.bf16_tflops * 1e12 * _FLOPS_SHARE
    if chain.preset in ("fp8", "int8-sq") and chain.needs(device) is None:
        speed *= 1.7  # 8-bit products: twice the arithmetic, less what is not a product
    step = max(
        moved / (device.bandwidth_gb_s * 1e9 * _BANDWIDTH_SHARE), flops * load.concurrency / speed
    )
    prompt = flops * load.concurrency * load.input_length / speed
    total = prompt + (load.output_length - 1) * step
    return _Estimate(
        weights, loaded + cache, 1e3 * step, load.concurrency * load.output_length / total, group
    )


def _bits(source: Checkpoint, preset: str) -> tuple[float, int | None]:
    """Average bits of a weight, and the group size that fits the model."""
    geometry = geometry_of(source)
    for size in (None, 64, 32, 16):
        try:
            presets = chosen_presets(
                geometry, QuantizePlan(preset=preset, group_size=size), dtype=source.dtype
            )
            for name, one in presets.items():
                one.scheme.check_fits(name, geometry.linears[name.split(".", 3)[3]])
        except SchemeError:
            continue
        return average_bits(geometry, presets, source.dtype), size
    return math.nan, None


def _reason(chain: _Chain, use: Use, plain: _Estimate, found: _Estimate) -> str:
    smaller, faster = plain.weights / found.weights, found.throughput / plain.throughput
    aim = {"throughput": "throughput", "size": "memory", "latency": "the time between tokens"}[
        _AIMS[use]
    ]
    if chain.preset is None:
        return f"{use} is after {aim}; this is the measure of the others"
    healed = " (healing takes text and hours)" if chain.kept_layers < 1 else ""
    return (
        f"{use} is after {aim}: weights {smaller:.1f} × smaller, about {faster:.1f} × the throughput under "
        f"this load{healed}"
    )


def _commands(model: str, chain: _Chain, use: Use, group_size: int | None) -> tuple[str, ...]:
    found, source = [], model
    if chain.kept_layers < 1:
        found.append(
            f"tinier prune {model} --keep-layers {100 * chain.kept_layers:.0f}% --out pruned"
        )
        found.append(f"tinier distill pruned --teacher {model} --out healed")
        source = "healed"
    served = source
    if chain.preset is not None:
        group = f" --group-size {group_size}" if group_size else ""
        small = " --embedding int8" if use in _SMALL else ""
        found.append(
            f"tinier quantize {source} --preset {chain.preset}{group}{small} --out compressed"
        )
        served = "compressed"
    if use == "mobile" and chain.preset == "int4-gptq":
        found.append(f"tinier export {served} --to gguf --out for-llama.cpp")
    else:
        found.append(f"tinier serve {served}")
    return tuple(found)
