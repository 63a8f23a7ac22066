"""Quantize a checkpoint: folder in, folder out, one decoder layer in memory at a time.

Start at `quantize`. Calibration windows flow through the decoder layer by layer; each layer is
quantized on the inputs that the quantized layers before it give, written, and run to make the inputs of
the next, meanwhile. A run that was stopped finds the layers that it wrote and sends the windows through
them again, so it goes on with the very numbers that it would have had.
"""

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinier.calibration import (
    DecoderWalk,
    Drift,
    InputStatistics,
    KeysAndValues,
    LayerWeights,
    observe,
    token_weights,
)
from tinier.checkpoint import (
    Checkpoint,
    PartFiles,
    StagePlan,
    check_output,
    copy_side_files,
    new_file,
    open_checkpoint,
    pack_linear,
    resumable_folder,
    unfinished_folder,
    write_atomically,
    write_config,
)
from tinier.device import (
    check_memory,
    free_memory_bytes,
    model_flops,
    pick_device,
    release_memory,
    reset_peak_memory,
)
from tinier.families import (
    EMBEDDING,
    EMBEDDING_MODULE,
    FINAL_NORM,
    HEAD,
    HEAD_LINEAR,
    geometry_of,
    layer_name,
    norm_weight,
)
from tinier.kernels import static_scale
from tinier.numerics import Quantized, snr_db
from tinier.progress import bar, say, warn
from tinier.quantization.layer import (
    LayerPresets,
    QuantizedLayer,
    first_moments,
    install,
    quantize_layer,
)
from tinier.quantization.learned import Importance, learn_rounding
from tinier.quantization.mixed import Found, mix
from tinier.quantization.plan import (
    QuantizePlan,
    chosen_presets,
    format_named,
    kv_grid,
    layer_presets,
    needs_text,
    output_config,
    prepare,
    reads_text,
)
from tinier.quantization.scales import round_table
from tinier.ranks import Ranks, join_ranks
from tinier.schemes import Layout
from tinier.text import BUILTIN, Text, documents_of, written_windows

# below this signal-to-noise ratio a layer's weights have lost about a bit more than INT4 costs
_POOR_SNR_DB = 12.0


def quantize(
    source: Checkpoint,
    plan: QuantizePlan,
    out: Path | str,
    *,
    text: Text = BUILTIN,
    device: str = "auto",
    targets: Path | None = None,
) -> Checkpoint:
    """Write `source` quantized as `plan` says to the new folder `out`; returns it opened.

    text: to calibrate on, for presets that need it. targets: folder for the 16-bit weights that the codes
    stand for (equalization folded in, drift corrected, not rounded), a file a layer. The same call goes
    on where one that was stopped left off. Under torchrun the calibration windows are split over the
    processes. Raises SchemeError, TextError, InputError or OutputError before any work.
    """
    return quantize_all(source, {Path(out): plan}, text=text, device=device, targets=targets)[0]


def quantize_all(
    source: Checkpoint,
    plans: dict[Path, QuantizePlan],
    *,
    text: Text = BUILTIN,
    device: str = "auto",
    targets: Path | None = None,
) -> list[Checkpoint]:
    """Quantize `source` in several ways in one walk over its layers and the text; see `quantize`.

    plans: by the folder to write. Finished folders come back in the same order. targets: see
    `quantize`; with one plan only.
    """
    assert targets is None or len(plans) == 1
    started = time.monotonic()
    for out in plans:
        check_output(out)
    place = pick_device(device)
    ranks = join_ranks(place)
    reset_peak_memory(place)
    jobs, speed = [], model_flops(place)
    read = any(map(reads_text, plans.values()))
    documents = documents_of(text, "calibration") if read else ()
    prepared = {out: prepare(source, plan, documents) for out, plan in plans.items()}
    for stage, _ in prepared.values():
        _announce(stage, place, speed)
    # the layers of all are made one after the other, their hidden states flow side by side
    check_memory(
        sum(stage.memory_bytes for stage, _ in prepared.values()), place,
        f"quantizing {source.folder.name}",
        "Use fewer or shorter --windows, fewer presets at once, or another --device.",
    )  # fmt: skip
    for out, plan in plans.items():
        stage, windows = prepared[out]
        jobs.append(_Job(source, plan, stage, windows, out, place, ranks, targets))
    with ExitStack() as stack:
        for job in jobs:
            job.start(stack)
        layers = geometry_of(source).layers
        with bar("quantize", layers) as advance:
            for index in range(layers):
                for job in jobs:
                    job.layer(index)
                advance(1)
        for job in jobs:
            job.finish(started)
    ranks.wait()
    release_memory()
    return [open_checkpoint(out) for out in plans]


def _announce(stage: StagePlan, device: torch.device, flops_per_s: float) -> None:
    """Say what it will take, and what to know beforehand."""
    free = free_memory_bytes(device)
    say(
        f"quantize {stage.parameters['preset']}: about {stage.memory_bytes / 1e9:.1f} GB of memory "
        f"({free / 1e9:.1f} free), "
        f"{stage.output_bytes / 1e9:.2f} GB on disk, "
        f"{stage.estimated_seconds(flops_per_s) / 60:.1f} min"
    )
    for warning in stage.warnings:
        warn(warning)


class _Job:
    """One quantization on its way through the layers."""

    def __init__(
        self,
        source: Checkpoint,
        plan: QuantizePlan,
        stage: StagePlan,
        windows: Tensor | None,
        out: Path,
        device: torch.device,
        ranks: Ranks,
        targets: Path | None,
    ) -> None:
        self._source, self._plan, self._stage = source, plan, stage
        self._targets = targets
        self._geometry = geometry_of(source)
        self._out, self._device, self._ranks = out, device, ranks
        # a few random windows, where no text is needed, are seen by every process
        self._sharing = ranks if needs_text(plan) else Ranks()
        self._presets = chosen_presets(self._geometry, plan, dtype=source.dtype)
        self._windows = windows
        self._mixed: Found | None = None
        self._embedding: Quantized | None = None
        self._hidden: Tensor | None = None
        self._exact: Tensor | None = None
        self._weights: list[LayerWeights] | None = None
        self._written: Future[None] | None = None

    def start(self, stack: ExitStack) -> None:
        """Open the folder to write and bring the windows in front of the first layer."""
        if self._ranks.writes:
            key, needed = self._stage.key, self._stage.output_bytes
            self._folder = stack.enter_context(
                resumable_folder(self._out, key, needed_bytes=needed)
            )
        self._ranks.wait()
        if not self._ranks.writes:
            self._folder = unfinished_folder(self._out)
        self._parts = PartFiles(self._folder, self._geometry.layers + 1)
        # written in order; seen alike by all processes while none writes
        self._done = sum(map(self._parts.has, range(self._geometry.layers)))
        self._ranks.wait()
        self._writer = stack.enter_context(ThreadPoolExecutor(1))
        plan = self._plan
        if plan.self_text:
            self._windows = self._write_text()
        length = 1 if self._windows is None else self._windows.shape[1]
        self._walk = DecoderWalk(self._source, length, self._device)
        if EMBEDDING_MODULE in self._presets:
            self._embedding = self._rounded(EMBEDDING_MODULE)
        if self._windows is None:
            return
        if plan.bits is not None:
            self._mix()
        windows = self._sharing.share(self._windows, self._walk.batch_windows)
        if plan.weighs_tokens:
            self._weights = self._fisher(windows)
        self._hidden = self._walk.embed(windows, self._embedding)
        learns = any(p.algorithm.rounding == "learned" for p in self._presets.values())
        if learns or plan.corrects_drift:
            # the windows on their way through the original model
            self._exact = self._walk.embed(windows)

    def _write_text(self) -> Tensor:
        """Windows that the model writes, once."""
        path, plan = self._folder / ".windows", self._plan
        if not path.exists() and self._ranks.writes:
            windows = written_windows(
                self._source, plan.windows, plan.length, seed=plan.seed, device=self._device
            )
            write_atomically(path, json.dumps(windows.tolist()))
        self._ranks.wait()
        return torch.tensor(json.loads(path.read_text(encoding="ascii")))

    def _fisher(self, windows: Tensor) -> list[LayerWeights]:
        """What each token of this rank's windows counts for, by layer; computed once."""
        path = self._folder / f".fisher-{self._ranks.rank}"
        if path.exists():
            stored = load_file(path)
            return [
                LayerWeights.of_tensors(
                    {n.partition("/")[2]: t for n, t in stored.items() if n.startswith(f"{index}/")}
                )
                for index in range(self._geometry.layers)
            ]
        found = token_weights(self._source, self._walk, windows, self._plan.seed, self._sharing)
        with new_file(path) as partial:
            save_file(
                {
                    f"{index}/{name}": tensor
                    for index, of in enumerate(found)
                    for name, tensor in of.to_tensors().items()
                },
                partial,
            )
        return found

    def _mix(self) -> None:
        """Choose a format for every layer."""
        assert self._windows is not None
        path = self._folder / ".mixed.json"
        if not path.exists() and self._ranks.writes:
            found = mix(
                self._source, self._walk, self._plan, self._windows, self._folder / ".rounded"
            )
            write_atomically(path, json.dumps(found._asdict()))
        if self._ranks.writes:
            shutil.rmtree(self._folder / ".rounded", ignore_errors=True)
        self._ranks.wait()
        self._mixed = Found(**json.loads(path.read_text(encoding="utf-8")))
        mixed = {name: format_named(label) for name, label in self._mixed.formats.items()}
        self._presets = chosen_presets(self._geometry, self._plan, mixed, self._source.dtype)

    @torch.no_grad()
    def layer(self, index: int) -> None:
        """Quantize and write one layer unless that is done, then send the windows through it."""
        prefix = layer_name(index)
        presets = layer_presets(self._presets, prefix)
        made = self._quantize(index, presets) if index >= self._done else None
        if made is None:
            self._run_original(index)
        if self._hidden is None or index + 1 == self._geometry.layers:
            return
        if made is None:
            tensors = self._parts.read(index, self._device)
        else:
            tensors = self._ranks.spread(made, self._device)
        module = self._walk.load(index)
        install(module, prefix, tensors, presets)
        self._walk.run(module, self._hidden, self._hidden, self._cache(prefix, tensors))

    def _quantize(self, index: int, presets: LayerPresets) -> dict[str, Tensor]:
        """The tensors of a layer, quantized, and on their way to the disk; empty but at the first rank."""
        prefix, module = layer_name(index), self._walk.load(index)
        statistics: dict[str, InputStatistics] = {}
        first = None
        corrected = self._plan.corrects_drift
        cache, kv = KeysAndValues(None) if self._plan.kv else None, kv_grid(self._plan.kv)
        if self._hidden is not None and self._windows is not None:
            statistics, first = observe(
                self._walk, module, self._geometry, self._hidden, len(self._windows), self._sharing,
                moments=first_moments(self._geometry, presets, corrects_drift=corrected), cache=cache,
                weights=self._weights[index] if self._weights else None,
            )  # fmt: skip
        scales: list[Tensor] = []
        if cache is not None and kv is not None:
            scales = [static_scale(most, kv) for most in cache.absmax]
        result = quantize_layer(
            module, presets, statistics, self._geometry, self._source.dtype, self._ranks,
            self._drift(index, scales) if corrected else None,
        )  # fmt: skip
        self._run_original(index)
        learned = [n for n, p in presets.items() if p.algorithm.rounding == "learned"]
        inputs = outputs = importance = None
        if learned and self._hidden is not None and self._exact is not None:
            inputs, outputs = self._ranks.gather(self._hidden), self._ranks.gather(self._exact)
            importance = self._importance(index)
        if result is None:
            return {}
        if inputs is not None and outputs is not None and importance is not None and learned:
            self._learn(index, module, result, learned, inputs, outputs, importance)
        tensors = result.tensors(prefix)
        if scales:
            tensors |= {
                f"{prefix}.self_attn.{name}": scale
                for name, scale in zip(("k_scale", "v_scale"), scales, strict=True)
            }
        measures = {f"{prefix}.{name}": values for name, values in result.measures().items()}
        # corrected weights are meant to give other outputs than the original's on the same inputs
        if self._hidden is not None and first is not None and not corrected:
            install(module, prefix, tensors, presets)
            batch = self._hidden[: self._walk.batch_windows].to(self._device)
            rounded = self._walk.forward(module, batch, self._cache(prefix, tensors))
            # of what the layer adds: what passes it by would make every layer look good
            measures[prefix] = {"output_snr_db": snr_db(first - batch, rounded - batch)}
        warnings = [f"{prefix}: {warning}" for warning in result.warnings]
        if self._targets is not None:
            # before the layer itself, which counts as done once it is there
            write_targets(self._targets, index, result.targets, self._source.dtype)
        self._wait_for_disk()
        record = {"layers": measures, "warnings": warnings}
        self._written = self._writer.submit(self._parts.write, index, tensors, record)
        if self._exact is not None:
            release_memory()  # autograd leaves cycles behind
        return tensors

    def _drift(self, index: int, scales: list[Tensor]) -> Drift:
        """A layer's inputs beside the original model's. scales: of keys and values, where those are
        rounded."""
        assert self._exact is not None
        assert self._hidden is not None
        kv, kept = kv_grid(self._plan.kv), None
        if kv is not None:
            kept = KeysAndValues.static(kv.kind, *(scale.to(self._device) for scale in scales))
        return Drift(
            self._walk, self._walk.load(index), self._exact, self._hidden, self._geometry,
            self._weights[index] if self._weights else None, self._sharing, kept,
        )  # fmt: skip

    def _run_original(self, index: int) -> None:
        """Send the original model's windows through a layer, where they are needed."""
        if self._exact is not None:
            self._walk.run(self._walk.load(index), self._exact, self._exact)

    def _wait_for_disk(self) -> None:
        """Until the layer before is written. Raises what kept it from that."""
        if self._written is not None:
            self._written.result()

    def _learn(
        self, index: int, module: nn.Module, result: QuantizedLayer, names: list[str],
        inputs: Tensor, outputs: Tensor, importance: Importance,
    ) -> None:  # fmt: skip
        before = dict(result.linears)
        error_before, error_after = learn_rounding(
            self._walk, module, result, names, inputs, outputs, importance,
            iterations=self._plan.iterations, seed=self._plan.seed * 10_000 + index,
        )  # fmt: skip
        if not error_after < error_before:
            result.linears = before
            result.warnings.append(
                "learned rounding did not lower the error; GPTQ's codes are kept"
            )

    def _importance(self, index: int) -> Importance:
        """What errors of a layer's outputs count, for all ranks' windows."""
        if self._weights is None:
            return Importance(self._next_norm(index).square(), None)
        own = self._weights[index]
        tokens = self._ranks.gather(own.tokens)
        return Importance(own.channels.to(self._device), tokens.to(self._device))

    def _next_norm(self, index: int) -> Tensor:
        """The weight [hidden] of the norm that reads what a layer puts out; ones where none does."""
        name, inside = FINAL_NORM, self._geometry.norm_names.attention_in
        if index + 1 < self._geometry.layers:
            if inside is None:
                return torch.ones(self._geometry.hidden, device=self._device)
            name = f"{layer_name(index + 1)}.{inside}.weight"
        with self._source.reader(self._device) as read:
            return norm_weight(read(name), self._geometry).float()

    def _cache(self, prefix: str, tensors: dict[str, Tensor]) -> KeysAndValues | None:
        """What rounds keys and values on their way through the quantized layer."""
        grid = kv_grid(self._plan.kv)
        if grid is None:
            return None
        key_scale, value_scale = (
            tensors[f"{prefix}.self_attn.{n}"].to(self._device) for n in ("k_scale", "v_scale")
        )
        return KeysAndValues.static(grid.kind, key_scale, value_scale)

    def finish(self, started: float) -> None:
        """Write what is not in a decoder layer, the configuration and the manifest."""
        if not self._ranks.writes:
            return
        self._wait_for_disk()
        last = self._geometry.layers
        if not self._parts.has(last):
            self._parts.write(last, self._edge_tensors(), {"layers": {}, "warnings": []})
        self._parts.close()
        records = [self._parts.record(part) for part in range(last + 1)]
        layers: dict[str, dict[str, float | None]] = {}
        left = self._stage.parameters["left_in_16_bit"]
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings = [f"left in 16 bit: {', '.join(left[:3])}{more}"] if left else []
        told: list[str] = []
        for record in records:
            layers |= record["layers"]
            told += record["warnings"]
        schemes = {name: preset.scheme for name, preset in self._presets.items()}
        layout = Layout(schemes=schemes, kv_cache=kv_grid(self._plan.kv))
        write_config(self._folder, output_config(self._source, layout))
        copy_side_files(self._source, self._folder)
        measures: dict[str, Any] = {"layout": layout.label}
        if self._mixed is not None:
            measures["mixed"] = self._mixed._asdict()
        self._stage.manifest(
            started=started,
            device=self._device,
            layers=layers,
            measures=measures,
            warnings=warnings + _gathered(told) + _poor(layers),
        ).write(self._folder)

    def _edge_tensors(self) -> dict[str, Tensor]:
        """Embedding, final norm and head."""
        tied, tensors = self._geometry.tied_head, {}
        with self._source.reader(self._device) as read:
            tensors[FINAL_NORM] = read(FINAL_NORM)
            if self._embedding is None:
                tensors[EMBEDDING] = read(EMBEDDING)
            if HEAD_LINEAR not in self._presets and not tied:
                tensors[HEAD] = read(HEAD)
        if self._embedding is not None:
            tensors |= self._packed(EMBEDDING_MODULE, self._embedding)
        head = self._presets.get(HEAD_LINEAR)
        if head is None:
            return tensors
        if not tied or self._embedding is None:
            return tensors | self._packed(HEAD_LINEAR, self._rounded(HEAD_LINEAR))
        if head.scheme.weights.bits == 8:
            # transformers ties the codes and has scales for each module
            tensors[f"{HEAD_LINEAR}.weight_scale"] = self._embedding.scale.clone()
        return tensors

    def _rounded(self, name: str) -> Quantized:
        """The embedding or the head, each scale searched."""
        tensor = HEAD if name == HEAD_LINEAR and not self._geometry.tied_head else EMBEDDING
        grid, dtype = self._presets[name].scheme.weights, self._source.dtype
        with self._source.reader(self._device) as read:
            return round_table(read(tensor), grid, dtype)

    def _packed(self, name: str, codes: Quantized) -> dict[str, Tensor]:
        parts = pack_linear(codes, self._presets[name].scheme)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def write_targets(folder: Path, index: int, targets: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Keep the weights that a layer's codes stand for, by name inside the layer."""
    host = {name: target.to(dtype).cpu().contiguous() for name, target in targets.items()}
    with new_file(_targets_path(folder, index)) as partial:
        save_file(host, partial)


def read_targets(folder: Path, index: int) -> dict[str, Tensor]:
    """What `write_targets` kept."""
    tensors: dict[str, Tensor] = load_file(_targets_path(folder, index))
    return tensors


def _targets_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _poor(layers: dict[str, dict[str, float | None]]) -> list[str]:
    """A warning about weights that lost more than rounding to 4 bits would cost them."""
    ratios = {name: ratio for name, m in layers.items() if (ratio := m.get("snr_db")) is not None}
    poor = {name: ratio for name, ratio in ratios.items() if ratio < _POOR_SNR_DB}
    if not poor:
        return []
    worst = min(poor, key=lambda name: poor[name])
    return [
        f"weights of {len(poor)} of {len(ratios)} linear layers keep less than {_POOR_SNR_DB:g} dB of "
        f"signal over rounding noise; the least is {poor[worst]} dB in {worst}"
    ]


def _gathered(warnings: list[str]) -> list[str]:
    """Warnings `LAYER: what`, those that say the same of several layers as one."""
    layers: dict[str, list[str]] = {}
    for warning in warnings:
        layer, _, what = warning.partition(": ")
        layers.setdefault(what, []).append(layer)
    return [
        f"{found[0]}{f' and {len(found) - 1} more layers' if len(found) > 1 else ''}: {what}"
        for what, found in layers.items()
    ]
