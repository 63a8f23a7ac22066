"""What a quantization would make, asked before it is made: whether a target will read it."""

from dataclasses import replace
from pathlib import Path

from tinier.checkpoint import Checkpoint, TensorInfo, quantization_config
from tinier.errors import InputError, SchemeError
from tinier.exporting.targets import TARGETS, target_config
from tinier.families import geometry_of, linear_names, module_names
from tinier.quantization import QuantizePlan
from tinier.quantization.plan import chosen_presets, kv_grid
from tinier.schemes import PRESETS, Layout


def planned(source: Checkpoint, plan: QuantizePlan) -> Checkpoint:
    """The checkpoint that a plan would make of a 16-bit one, without weights."""
    geometry = geometry_of(source)
    schemes = {name: preset.scheme for name, preset in chosen_presets(geometry, plan).items()}
    layout = Layout(schemes=schemes, kv_cache=kv_grid(plan.kv))
    block = quantization_config(layout, module_names(geometry))
    tensors = {}
    if any(scheme.weights.kind == "e5m2" for scheme in schemes.values()):
        name = f"{linear_names(geometry)[0]}.weight"  # only the codes tell it from E4M3
        tensors[name] = TensorInfo("model.safetensors", name, "F8_E5M2", (1,), 1)
    config = source.config | {"quantization_config": block}
    return Checkpoint(Path("the result"), config, tensors, None)


def suited(source: Checkpoint, plan: QuantizePlan, to: str) -> QuantizePlan:
    """The plan for a later export to `to`: with the group size that the target's blocks have, unless the
    plan names one. Raises InputError for an unknown target, SchemeError where the export would be refused.
    """
    if to not in TARGETS:
        raise InputError(f"--for {to} is not known. Targets: {', '.join(TARGETS)}.")
    if plan.preset is None or plan.mixes:
        raise SchemeError(
            f"--for goes with a preset of one format, and not with {plan.preset}. Leave --for out."
        )
    size, preset = TARGETS[to].group_size, PRESETS.get(plan.preset)
    takes_size = (
        preset is not None
        and preset.scheme.weights.group_size is not None
        and preset.scheme.weights.scale_format == "model"
    )
    if size is not None and plan.group_size is None and takes_size:
        plan = replace(plan, group_size=size)
    target_config(planned(source, plan), to)
    return plan
