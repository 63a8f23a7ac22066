"""A decoder's sizes out of config.json, with transformers' defaults, or why tinier cannot compute it.

Start at `geometry_of`.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

import torch

from tinier.checkpoint import Checkpoint, cache_folder, layout_of, write_atomically
from tinier.errors import CheckpointError, InputError
from tinier.families.geometry import Geometry, module_names
from tinier.families.table import (
    FAMILIES,
    NO_MULTIPLIERS,
    Family,
    LayerKind,
    Mixture,
    Multipliers,
)
from tinier.schemes import Layout

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
# counted up when what is kept changes
_CACHE_VERSION = 1
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def checkpoint_layout(checkpoint: Checkpoint) -> Layout | None:
    """How the checkpoint is quantized; None if it is not. Raises CheckpointError."""
    return layout_of(checkpoint.config, module_names(geometry_of(checkpoint)))


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raise InputError for sequences longer than the model has positions for."""
    positions = geometry_of(checkpoint).max_positions
    if length > positions:
        raise InputError(
            f"{length} tokens are more than the {positions} positions of {checkpoint.folder.name}. "
            f"Use at most {positions}."
        )


def family_of(checkpoint: Checkpoint) -> Family:
    """The table row of a checkpoint. Raises CheckpointError for an unknown architecture."""
    architectures = checkpoint.config.get("architectures") or ["(none named)"]
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise CheckpointError(
            f"{checkpoint.folder} is a {architectures[0]}. tinier knows these families: "
            f"{', '.join(FAMILIES)}. Give a model of one of them."
        )
    return family


def resolved_config(checkpoint: Checkpoint) -> SimpleNamespace:
    """config.json with transformers' defaults filled in, kept by what it says."""

    def make() -> dict[str, Any]:
        config = hf_config(checkpoint)
        values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        others = config.attribute_map.items()
        return values | {other: values[key] for other, key in others if key in values}

    return SimpleNamespace(**cached_from_transformers("configs", _plain_values(checkpoint), make))


def cached_from_transformers(
    folder: str, of: object, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `make` gets from transformers, whose import takes seconds; or what it gave before, which is kept
    in a folder of tinier's cache for this version of transformers. of: all else that it depends on, as JSON
    can say it."""
    said = json.dumps([*_transformers(), of], sort_keys=True)
    name = f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    path = cache_folder() / folder / name
    with suppress(OSError, ValueError):  # there is none, or none that can be read
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    values = make()
    with suppress(OSError):  # a cache that cannot be written costs seconds at each start
        write_atomically(path, json.dumps(values))
    return values


@cache
def _transformers() -> tuple[int, str]:
    return _CACHE_VERSION, version("transformers")


def _plain_values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}


def hf_config(checkpoint: Checkpoint) -> Any:
    """transformers' own configuration object, with its defaults filled in."""
    from transformers import CONFIG_MAPPING  # a second

    try:
        values = _plain_values(checkpoint)
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # its strict classes have errors of their own
        path = checkpoint.folder / "config.json"
        told = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"transformers rejects {path}: {told:.300}") from None


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """Sizes of a checkpoint's decoder. Raises CheckpointError for what tinier cannot run."""
    family = family_of(checkpoint)
    config = resolved_config(checkpoint)
    _check_computable(checkpoint, config)
    _check_sizes(checkpoint, config)
    _check_mixture(checkpoint, family.mixture, config)
    mixture = family.mixture
    bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    return Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, mixture.width_key if mixture else "intermediate_size"),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        turning=_turning(config),
        vocab=config.vocab_size,
        max_positions=_positions(config),
        alike_positions=_alike_positions(config),
        norm_eps=config.rms_norm_eps,
        tied_head=bool(config.tie_word_embeddings),
        qkv_bias=bias if family.qkv_bias == "config" else family.qkv_bias,
        out_bias=bias if family.qkv_bias == "config" else False,
        mlp_bias=mlp_bias if family.mlp_bias == "config" else family.mlp_bias,
        head_norms=family.head_norms,
        hidden_in_heads=family.hidden_in_heads,
        kinds=_kinds(family, config),
        norm_names=family.norms,
        norm_offset=family.norm_offset,
        norms_in_float32=family.norms_in_float32,
        rope_in_float32=family.rope_in_float32,
        fused=family.fused,
        mixture=mixture,
        experts=getattr(config, mixture.count_key) if mixture else 0,
        top_k=config.num_experts_per_tok if mixture else 0,
        shares_sum_to_one=_shares_sum_to_one(mixture, config),
        multipliers=_multipliers(family, config, checkpoint.dtype),
        embedding_by_root=family.multipliers == "gemma",
        activation=_ACTIVATIONS[_activation(config)],
    )


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _check_computable(checkpoint: Checkpoint, config: Any) -> None:
    """Raise CheckpointError for what config.json asks for and tinier does not compute."""
    for key in rope_keys(config):
        rope_type = rope_parameters(config, key).get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise CheckpointError(
                f"{checkpoint.folder} uses RoPE of type {rope_type!r}; known: {', '.join(_ROPE_TYPES)}. "
                "Give another model."
            )
        theta = rope_parameters(config, key).get("rope_theta")
        if theta is not None and not (isinstance(theta, int | float) and theta > 0):
            path = checkpoint.folder / "config.json"
            raise CheckpointError(f"{path} has rope_theta={theta!r}. It is large, such as 10000.")
    activation = _activation(config)
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.folder} uses {activation!r}; known: {', '.join(_ACTIVATIONS)}. Give another "
            "model."
        )
    for name in (
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if getattr(config, name, None):
            raise CheckpointError(
                f"{checkpoint.folder} has {name}={getattr(config, name)} in config.json, which tinier "
                "does not compute. Give another model."
            )


def _shares_sum_to_one(mixture: Mixture | None, config: Any) -> bool:
    if mixture is None or mixture.sums_to_one != "config":
        return True
    return bool(config.norm_topk_prob)


def _check_mixture(checkpoint: Checkpoint, mixture: Mixture | None, config: Any) -> None:
    """Raise CheckpointError for experts that tinier does not compute."""
    if mixture is None:
        return
    path = checkpoint.folder / "config.json"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            f"{path} has layers without experts among those with (mlp_only_layers, decoder_sparse_step). "
            "tinier knows models of one kind of layer. Give another model."
        )
    count, chosen = getattr(config, mixture.count_key), config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise CheckpointError(
            f"{path} sends a token to {chosen} of {count} experts. Set num_experts_per_tok to 1 to {count}."
        )


def _check_sizes(checkpoint: Checkpoint, config: Any) -> None:
    """Raise CheckpointError for sizes that no decoder can have."""
    path = checkpoint.folder / "config.json"
    sizes = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    for name in sizes:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path} has {name}={value!r}. It is a number, 1 or more.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{path} has {config.num_attention_heads} query heads and {config.num_key_value_heads} KV "
            "heads. The second divides the first."
        )
    size, turning = _head_dim(config), _turning(config)
    if turning < 2 or turning % 2:
        raise CheckpointError(
            f"{path} has heads of size {size}, of which {turning} turn. RoPE turns pairs: that is even."
        )
    epsilon = config.rms_norm_eps
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"{path} has rms_norm_eps={epsilon!r}. It is small, such as 1e-5.")


def _head_dim(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _turning(config: Any) -> int:
    rope = rope_parameters(config, rope_keys(config)[-1])
    return int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))


def _positions(config: Any) -> int:
    """How long a sequence may be. Under YaRN (arXiv 2309.00071) and dynamic scaling
    `max_position_embeddings` is often left at what the model was trained on; what it reaches is that times
    the factor."""
    rope = rope_parameters(config, rope_keys(config)[-1])
    positions = int(config.max_position_embeddings)
    if rope.get("rope_type") not in ("yarn", "dynamic"):
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * rope.get("factor", 1.0)))


def _alike_positions(config: Any) -> int | None:
    """Where RoPE changes for whole sequences (`Geometry.alike_positions`)."""
    rope = rope_parameters(config, rope_keys(config)[-1])
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _kinds(family: Family, config: Any) -> tuple[LayerKind, ...]:
    """What each layer is."""
    windows = _windows(family, config)
    ropes: list[str | None] = [""] * len(windows)
    if "no_rope_layers" in family.per_layer:
        ropes = ["" if turned else None for turned in config.no_rope_layers]
    if rope_keys(config) != ("",):
        ropes = list(config.layer_types)
    return tuple(map(LayerKind, windows, ropes))


def rope_keys(config: Any) -> tuple[str, ...]:
    """The kinds of layers that have a RoPE of their own; ("",): all have one."""
    found: dict[str, Any] = config.rope_parameters or {}
    if not any(isinstance(value, dict) for value in found.values()):
        return ("",)
    return tuple(key for key in found if key in config.layer_types)


def rope_parameters(config: Any, key: str) -> dict[str, Any]:
    """Of one of `rope_keys`."""
    found: dict[str, Any] = config.rope_parameters or {}
    return found[key] if key else found


def _multipliers(family: Family, config: Any, dtype: torch.dtype) -> Multipliers:
    if family.multipliers == "none":
        return NO_MULTIPLIERS
    if family.multipliers == "gemma":
        root = torch.tensor(config.hidden_size**0.5).to(dtype).item()
        return Multipliers(embedding=root, attention=config.query_pre_attn_scalar**-0.5)
    return Multipliers(
        embedding=float(config.embedding_multiplier), residual=float(config.residual_multiplier),
        logits=float(config.logits_scaling), attention=float(config.attention_multiplier),
    )  # fmt: skip


def _windows(family: Family, config: Any) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    if family.windows == "none":
        return (None,) * layers
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if family.windows == "all":
        return (window,) * layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
