"""LoRA adapters of PEFT's: merged into their base, BASE+ADAPTER wherever a model is named; or several of
them beside one base, for an engine that computes them in one batch.

Start at `merged` and `read_adapter`. A weight W [out, in] becomes W + s · B · A with s = alpha / r (LoRA,
arXiv 2106.09685), or alpha / √r (rsLoRA, arXiv 2312.03732); with a magnitude m for each row it becomes
m · W' / ‖W'‖ of that (DoRA, arXiv 2402.09353). What is merged is written to the cache once, and is a
checkpoint like any other: it is quantized, measured and served at the base's speed.
"""

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from tinier.checkpoint import (
    Checkpoint,
    StagePlan,
    TensorWriter,
    atomic_folder,
    cache_folder,
    code_digest,
    copy_side_files,
    read_json,
    write_config,
)
from tinier.checkpoint.folder import file_sha256
from tinier.checkpoint.writer import wait_for
from tinier.errors import CheckpointError
from tinier.families.configuration import geometry_of
from tinier.families.geometry import layer_name
from tinier.progress import say

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# what changes how an adapter is read, with the values that are known here
_KNOWN: dict[str, tuple[object, ...]] = {
    # others start from a changed base (PiSSA, OLoRA, CorDA), so the base as it is would be another model's
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "peft_type": ("LORA",), "fan_in_fan_out": (False, None), "lora_bias": (False, None),
    "layer_replication": (None,), "megatron_config": (None,), "alora_invocation_tokens": (None,),
    "target_parameters": (None, []), "trainable_token_indices": (None,),
}  # fmt: skip


class Update(NamedTuple):
    """Of one linear layer."""

    down: Tensor
    """A, [r, in]"""
    up: Tensor
    """B, [out, r]"""
    magnitude: Tensor | None
    """[out], of DoRA"""
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (out, in)."""
        return len(self.up), self.down.shape[1]

    def applied(self, weight: Tensor) -> Tensor:
        """The weight [out, in] with it, computed in float32, in the weight's type."""
        made = weight.float() + self.scale * (self.up.float() @ self.down.float())
        if self.magnitude is not None:
            made *= (self.magnitude.float().flatten() / made.norm(dim=1)).unsqueeze(1)
        return made.to(weight.dtype)


class Adapter(NamedTuple):
    updates: dict[str, Update]
    """By the weight's name"""
    replaced: dict[str, Tensor]
    """Tensors that were trained whole: biases, `modules_to_save`"""


def merged(base: Checkpoint, folder: Path) -> Path:
    """The folder of the merged checkpoint, made unless the cache has it.

    Raises CheckpointError for what is no LoRA adapter of this model.
    """
    if "quantization_config" in base.config:
        raise CheckpointError(
            f"{base.folder.name} is quantized. Merge the adapter into the 16-bit model, and quantize that: "
            "tinier quantize BASE+ADAPTER"
        )
    config = _config(folder)
    plan = StagePlan(
        stage="merge", parameters={"adapter_sha256": file_sha256(folder / _WEIGHTS), "config": config},
        inputs={"source": base}, output_config=base.config, output_bytes=base.disk_bytes, memory_bytes=0,
        flops=0.0, code=code_digest("tinier.families.adapters"),
    )  # fmt: skip
    out = cache_folder() / f"merged-{plan.key[:16]}"
    with wait_for(out):
        if not out.exists():
            adapter = _read(folder, config, base)
            say(f"merging {folder.name} into {base.folder.name}")
            _write(base, adapter, plan, out)
    return out


def read_adapter(folder: Path, base: Checkpoint) -> dict[str, Update]:
    """What an adapter adds to linear layers of the blocks, by the weight's name.

    Raises CheckpointError for one that must be merged, or is another model's.
    """
    config = _config(folder)
    parts, replaced = _tensors(folder)
    reason = _only_merged(config, parts, replaced, base)
    if reason is not None:
        raise CheckpointError(f"{folder.name} {reason}. Merge it into its base: BASE+ADAPTER")
    updates = {name: _update(name, given, config, folder) for name, given in parts.items()}
    _check_shapes(
        folder, base, {name: update.shape for name, update in updates.items()}, _blocks(base)
    )
    for name, update in updates.items():
        # beside others it would reach requests that did not ask for it
        if not (update.down.isfinite().all() and (update.scale * update.up).isfinite().all()):
            raise CheckpointError(
                f"{folder / _WEIGHTS} has NaN or Inf in the update of {name}. Save it again."
            )
    return updates


def must_be_merged(folder: Path, base: Checkpoint) -> str | None:
    """Why an adapter cannot be computed beside its base; None: it can. Reads names alone."""
    config = _config(folder)
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        places = [_split(name.removeprefix(_PREFIX)) for name in file.keys()]  # noqa: SIM118
    changed = [f"{module}.weight" for module, part in places if part]
    return _only_merged(config, changed, [name for name, part in places if not part], base)


def _only_merged(
    config: dict[str, Any], changed: Iterable[str], replaced: Iterable[str], base: Checkpoint
) -> str | None:
    """changed: weights that something is added to. replaced: tensors that stand for the model's own."""
    whole = min(replaced, default=None)
    if whole is not None:
        return f"replaces {whole} beside what it adds"
    if config.get("use_dora"):
        return "is DoRA, which changes whole weights"
    other = min(set(changed) - _blocks(base).keys(), default=None)
    if other is not None:
        return f"changes {other}, and {base.folder.name} has no linear layer of that name in its blocks"
    return None


def _blocks(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that can be computed beside an adapter's."""
    geometry = geometry_of(base)
    return {
        f"{layer_name(i)}.{name}.weight": shape
        for i in range(geometry.layers)
        for name, shape in geometry.linears.items()
        if "experts" not in name
    }


def _check_shapes(
    folder: Path, base: Checkpoint, shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:  # fmt: skip
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"the adapter {folder.name} changes another model: it is for a {name} of {shape}, and "
                f"{base.folder.name} has {expected[name]} there. Give the model that it was trained on."
            )


def _config(folder: Path) -> dict[str, Any]:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}, so it is no LoRA adapter. Use BASE+ADAPTER with a folder that "
                "PEFT's save_pretrained wrote, in safetensors."
            )
    config = read_json(folder / _CONFIG)
    for key, allowed in _KNOWN.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"{folder / _CONFIG} has {key}={config[key]!r}, which is not known here. Merge it with "
                "PEFT: model.merge_and_unload()"
            )
    return config


def _read(folder: Path, config: dict[str, Any], base: Checkpoint) -> Adapter:
    """The adapter's tensors, checked against the model's."""
    updates, replaced = _tensors(folder)
    for name in (*updates, *replaced):
        if name not in base.tensors:
            raise CheckpointError(
                f"the adapter {folder.name} changes {name}, which {base.folder.name} does not have. "
                "Give the model that it was trained on."
            )
    made = {name: _update(name, parts, config, folder) for name, parts in updates.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in replaced.items()}
    shapes |= {name: update.shape for name, update in made.items()}
    _check_shapes(folder, base, shapes, {name: tuple(t.shape) for name, t in base.tensors.items()})
    return Adapter(made, replaced)


def _tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each weight's update, and the tensors that stand for the model's own."""
    updates: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            own = name.removeprefix(_PREFIX)
            module, part = _split(own)
            if part:
                updates.setdefault(f"{module}.weight", {})[part] = file.get_tensor(name)
            else:
                replaced[own] = file.get_tensor(name)
    return updates, replaced


def _split(name: str) -> tuple[str, str]:
    """The module and the part of an update; without a part it is a tensor of the model's."""
    for part in _PARTS:
        for ending in (f".{part}", f".{part}.weight"):
            if name.endswith(ending):
                return name.removesuffix(ending), part
    return name, ""


def _update(name: str, parts: dict[str, Tensor], config: dict[str, Any], folder: Path) -> Update:
    wanted = {*_PARTS[:2], *(_PARTS[2:] if config.get("use_dora") else ())}
    if not wanted <= parts.keys():
        raise CheckpointError(
            f"{folder / _WEIGHTS} has but half of the update of {name}. Save it again."
        )
    module = name.removesuffix(".weight")
    try:
        rank = _of(module, config.get("rank_pattern"), config["r"])
        alpha = _of(module, config.get("alpha_pattern"), config["lora_alpha"])
    except KeyError as error:
        raise CheckpointError(
            f"{folder / _CONFIG} has no {error}. Save the adapter again."
        ) from None
    down, up = parts["lora_A.weight"], parts["lora_B.weight"]
    if not len(down) == up.shape[1] == rank:
        raise CheckpointError(
            f"{folder / _CONFIG} says that the rank of {name} is {rank}, and its tensors have {len(down)}."
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Update(down, up, parts.get("lora_magnitude_vector"), scale)


def _of(module: str, patterns: dict[str, float] | None, usual: float) -> float:
    """A value that may differ by module, whose name the pattern ends."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def _write(base: Checkpoint, adapter: Adapter, plan: StagePlan, out: Path) -> None:
    started = time.monotonic()
    with atomic_folder(out, needed_bytes=plan.output_bytes) as partial, base.reader() as read:
        writer = TensorWriter(partial)
        for name in base.tensors:
            tensor = read(name)
            if name in adapter.updates:
                tensor = adapter.updates[name].applied(tensor)
            elif name in adapter.replaced:
                tensor = adapter.replaced[name].to(tensor.dtype)
            writer.add(name, tensor)
        writer.close()
        write_config(partial, plan.output_config)
        copy_side_files(base, partial)
        plan.manifest(started=started, device=torch.device("cpu")).write(partial)
