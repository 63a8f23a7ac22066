"""A model as every stage and the engine see it: resolved, verified, in the usual names; `open_model`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinier.checkpoint import (
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    read_json,
    resolve,
    stored_shapes,
)
from tinier.checkpoint.modelopt import usual_name
from tinier.errors import CheckpointError
from tinier.families.adapters import merged
from tinier.families.configuration import checkpoint_layout, family_of, geometry_of, resolved_config
from tinier.families.geometry import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Geometry,
    layer_name,
)
from tinier.progress import warn
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR, Scheme

# buffers that older files carry and every loader computes for itself
_BUFFERS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")
_HEAD_SCALE = f"{HEAD_LINEAR}.weight_scale"
# what a weight of 16 bits or more may be stored in
_WEIGHT_TYPES = ("BF16", "F16", "F32", "F64")
# models that see pictures too, and what their language model alone is; of config.json's outer part it needs
_TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
_OUTER_KEYS = (
    "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config", "transformers_version",
)  # fmt: skip


def open_model(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Resolve and verify a model of a known family, in the names and types that stages and engine know;
    loads no weights.

    Where its files do other than config.json says and there is one right reading, that is taken, said as
    a warning, and kept in `Checkpoint.notes`.
    model: folder, Hub id, .gguf file or built-in name; BASE+ADAPTER: with a LoRA adapter merged into it.
    Raises CheckpointError or NetworkError.
    """
    base, adapter = split_adapter(model)
    if adapter is not None:
        folder = merged(open_model(base, revision), resolve(adapter))
        checkpoint = _canonical(open_checkpoint(folder))
    else:
        checkpoint = _canonical(open_checkpoint(resolve(str(model), revision)))
    for note in checkpoint.notes:
        warn(f"{checkpoint.folder.name}: {note}")
    return checkpoint


def split_adapter(model: str | Path) -> tuple[str, str | None]:
    """BASE and ADAPTER of BASE+ADAPTER; a model without one, and None."""
    text = str(model)
    cuts = [i for i, letter in enumerate(text) if letter == "+"]
    if cuts and not Path(text).expanduser().exists():
        # either's folder may have a + in its name
        for cut in reversed(cuts):
            if Path(text[cut + 1 :] or "?").expanduser().is_dir():
                return text[:cut], text[cut + 1 :]
        base, _, adapter = text.rpartition("+")
        if adapter[:1].isalnum() and "/" in adapter:
            return base, adapter
    return text, None


def _canonical(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tensors have the usual names and are all that its configuration calls for."""
    checkpoint, notes = _text_part(checkpoint)
    family = family_of(checkpoint)
    config = _with_quantization(checkpoint)
    for key in family.per_layer:
        if config.get(key) is None:  # said of each layer, so that it holds when some of them go
            config[key] = list(getattr(resolved_config(replace(checkpoint, config=config)), key))
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = str(checkpoint.dtype).removeprefix("torch.")
        notes.append(
            f"config.json names no dtype; {config['dtype']} is taken, which most of the weights are in"
        )
    if family.windows == "none" and config.get("sliding_window"):
        notes.append(
            f"sliding_window={config['sliding_window']} in config.json means nothing to a "
            f"{family.architecture} and is not used"
        )
    tensors = _usual_names(checkpoint.tensors)
    if (
        HEAD not in tensors
        and not config.get("tie_word_embeddings", False)
        and EMBEDDING in tensors
    ):
        config = _tied_by_default(checkpoint, config)
    checkpoint = replace(checkpoint, config=config, tensors=tensors)
    geometry = geometry_of(checkpoint)
    if "quantization_config" in config:
        checkpoint = _without_empty_biases(checkpoint, geometry)
    if geometry.tied_head:
        checkpoint, note = _check_tie(checkpoint)
        notes += [note] if note else []
    _check_tensors(checkpoint, geometry_of(checkpoint))
    other = sorted(
        {
            info.dtype.lower()
            for name, info in checkpoint.tensors.items()
            if name.endswith((".weight", ".bias")) and info.dtype in _WEIGHT_TYPES
        }
        - {_SHORT_TYPES[checkpoint.dtype]}
    )
    if other:
        notes.append(
            f"weights stored as {', '.join(other)} are read as "
            f"{str(checkpoint.dtype).removeprefix('torch.')}, which is the model's type"
        )
    return replace(checkpoint, notes=tuple(notes))


def _with_quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with a `quantization_config` if the model is quantized, and only then."""
    config = dict(checkpoint.config)
    if "compression_config" in config:
        raise CheckpointError(
            f"{checkpoint.folder} is quantized in an old layout of compressed-tensors "
            "(compression_config). Give the 16-bit model, or a checkpoint with quantization_config."
        )
    if config.get("quantization_config", ...) is None:
        del config["quantization_config"]
    told = (
        checkpoint.folder / "hf_quant_config.json"
    )  # ModelOpt's, before it wrote into config.json
    if "quantization_config" not in config and told.exists():
        block = read_json(told)["quantization"]
        config["quantization_config"] = {"quant_method": "modelopt"} | block
    return config


_SHORT_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _tied_by_default(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with its family's default spelled out: without `tie_word_embeddings` some are tied."""
    if "tie_word_embeddings" in config:
        return config
    tied = bool(resolved_config(replace(checkpoint, config=config)).tie_word_embeddings)
    return config | {"tie_word_embeddings": tied}


def _text_part(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Of a model that sees pictures too, the language model; any other as it is. With what was left out,
    for people."""
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    causal = _TEXT_PARTS.get(architecture)
    if causal is None:
        return checkpoint, []
    whole, tensors = checkpoint.config, {}
    for name, info in checkpoint.tensors.items():
        own = name.replace("language_model.", "", 1)
        if own != name or own == HEAD:
            tensors[own] = info
    outer = {key: whole[key] for key in _OUTER_KEYS if whole.get(key) is not None}
    config = outer | whole["text_config"] | {"architectures": [causal]}
    left = len(checkpoint.tensors) - len(tensors)
    return replace(checkpoint, config=config, tensors=tensors), [
        f"a {architecture}: its language model is taken, and {left} tensors that see pictures are left out"
    ]


def _usual_names(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names of a whole causal language model: a decoder alone (`LlamaModel`) lacks
    `model.`, a tied model may store the head and not the embedding."""
    if EMBEDDING.removeprefix("model.") in tensors:
        tensors = {
            name if name.startswith("lm_head.") else f"model.{name}": info
            for name, info in tensors.items()
        }
    if HEAD in tensors and not any(name.startswith(f"{EMBEDDING_MODULE}.") for name in tensors):
        tensors = {EMBEDDING if name == HEAD else name: info for name, info in tensors.items()}
    return {usual_name(name): info for name, info in tensors.items() if not name.endswith(_BUFFERS)}


def _without_empty_biases(checkpoint: Checkpoint, geometry: Geometry) -> Checkpoint:
    """Without the biases of zeros that AutoGPTQ gives layers that have none."""
    linears = {
        f"{layer_name(i)}.{name}" for i in range(geometry.layers) for name in geometry.linears
    }
    own = {f"{layer_name(i)}.{name}" for i in range(geometry.layers) for name in geometry.biases}
    biases = {f"{name}.bias" for name in linears} & checkpoint.tensors.keys() - own
    with checkpoint.reader() as read:
        empty = {name for name in biases if not read(name).any()}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in empty}
    return replace(checkpoint, tensors=tensors)


def _check_tie(checkpoint: Checkpoint) -> tuple[Checkpoint, str | None]:
    """A tied model that stores a head: without it where it is the embedding; with it, and untied, where
    it is another matrix, which is how transformers reads such files."""
    head = checkpoint.tensors.get(HEAD)
    if head is None or head.dtype not in _WEIGHT_TYPES:
        return checkpoint, None
    shapes = {name: checkpoint.tensors[name].shape for name in (EMBEDDING, HEAD)}
    if shapes[EMBEDDING] == shapes[HEAD]:
        with checkpoint.reader() as read:
            alike = torch.equal(read(EMBEDDING), read(HEAD))
        if alike:
            tensors = {name: info for name, info in checkpoint.tensors.items() if name != HEAD}
            return replace(checkpoint, tensors=tensors), None
    untied = replace(checkpoint, config=checkpoint.config | {"tie_word_embeddings": False})
    return untied, (
        f"config.json ties the head to the embedding and the weights hold another {HEAD}; that one "
        "is used"
    )


def _check_quantized_tie(checkpoint: Checkpoint, schemes: dict[str, Scheme]) -> None:
    """Raise CheckpointError where a tied head is not quantized as the embedding is."""
    embedding, head = schemes.get(EMBEDDING_MODULE), schemes.get(HEAD_LINEAR)
    if (embedding and embedding.weights) != (head and head.weights):
        raise CheckpointError(
            f"{checkpoint.folder} ties its head to its embedding, and quantization_config makes "
            f"{embedding.weights.label if embedding else '16 bit'} of the embedding and "
            f"{head.weights.label if head else '16 bit'} of the head, which cannot both be."
        )
    scales = [f"{EMBEDDING_MODULE}.weight_scale", _HEAD_SCALE]
    if all(name in checkpoint.tensors for name in scales):
        with checkpoint.reader() as read:
            if not torch.equal(*map(read, scales)):
                raise CheckpointError(
                    f"{checkpoint.folder} ties its head to its embedding, and their scales differ: "
                    f"{' and '.join(scales)}."
                )


def _check_tensors(checkpoint: Checkpoint, geometry: Geometry) -> None:
    """Raise CheckpointError unless the tensors are those that config.json calls for, all of them and no
    others, of the right shapes and types."""
    expected = _expected_shapes(checkpoint, geometry)
    layout = checkpoint_layout(checkpoint)
    schemes = layout.schemes if layout else {}
    # the shape of packed integers follows from the configuration, a tied head's scales are the embedding's
    known = {f"{name}.{part}" for name in schemes for part in ("weight_shape", "g_idx")}
    if geometry.tied_head and HEAD_LINEAR in schemes:
        known.add(_HEAD_SCALE)
    _check_leftovers(checkpoint, {*expected, *known})
    checkpoint.require(expected)
    for name, shape in expected.items():
        info = checkpoint.tensors[name]
        is_number = math.prod(info.shape) == math.prod(shape) == 1  # [] or [1]
        if info.shape != shape and not is_number:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} has shape {list(info.shape)}; config.json implies "
                f"{list(shape)}. The weights and the configuration are not of one model."
            )
    quantized = {f"{name}.weight" for name in schemes}
    for name in expected:
        info = checkpoint.tensors[name]
        plain = name.endswith((".weight", ".bias")) and name not in quantized
        if plain and info.dtype not in _WEIGHT_TYPES:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is stored as {info.dtype}, and config.json does not say "
                "that it is quantized. Give a checkpoint whose config.json has its quantization_config, "
                "or the 16-bit model."
            )


def _check_leftovers(checkpoint: Checkpoint, expected: set[str]) -> None:
    """Raise CheckpointError for tensors that nothing would read: the model would be another one than the
    files hold."""
    left = sorted(set(checkpoint.tensors) - expected)
    if not left:
        return
    some = ", ".join(left[:4]) + (" …" if len(left) > 4 else "")
    factors = next((name for name in left if name.endswith(".pre_quant_scale")), None)
    if factors is not None:
        name = factors.removesuffix(".pre_quant_scale")
        raise CheckpointError(
            f"the inputs of {name} in {checkpoint.folder} are multiplied with factors first "
            "(pre_quant_scale), which tinier does not do. Give the 16-bit model."
        )
    said = f"{checkpoint.folder} holds {len(left)} tensors that its config.json does not call for: {some}."
    if any(
        name.endswith((".weight_scale", ".weight_scale_inv", ".weight_packed")) for name in left
    ):
        raise CheckpointError(
            f"{said} They belong to quantized weights, which quantization_config must describe. Add it, "
            "or give the 16-bit model."
        )
    if all(name.endswith(".bias") for name in left):
        raise CheckpointError(
            f"{said} transformers would leave these biases out. If the model has them, config.json must "
            "say so (attention_bias, mlp_bias); if not, remove them."
        )
    raise CheckpointError(f"{said} Remove them, or correct config.json.")


def _expected_shapes(checkpoint: Checkpoint, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {FINAL_NORM: (geometry.hidden,)}
    layout = checkpoint_layout(checkpoint)
    schemes = layout.schemes if layout else {}
    if geometry.tied_head:
        _check_quantized_tie(checkpoint, schemes)
    linears = {
        f"{layer_name(i)}.{name}": shape
        for i in range(geometry.layers)
        for name, shape in geometry.linears.items()
    }
    linears[EMBEDDING_MODULE] = (geometry.vocab, geometry.hidden)
    if not geometry.tied_head:
        linears[HEAD_LINEAR] = (geometry.vocab, geometry.hidden)
    for name, shape in linears.items():
        if name not in schemes:
            shapes[f"{name}.weight"] = shape
            continue
        stored = stored_shapes(
            schemes[name], shape, layout.storage if layout else "compressed-tensors"
        )
        shapes.update({f"{name}.{part}": size for part, size in stored.items()})
    if geometry.router is not None:
        router = (geometry.experts, geometry.hidden)
        shapes |= {
            f"{layer_name(i)}.{geometry.router}.weight": router for i in range(geometry.layers)
        }
    for i in range(geometry.layers):
        for name, vector in (geometry.norms | geometry.biases).items():
            shapes[f"{layer_name(i)}.{name}"] = vector
        if layout and layout.kv_cache:
            shapes[f"{layer_name(i)}.self_attn.k_scale"] = (1,)
            shapes[f"{layer_name(i)}.self_attn.v_scale"] = (1,)
    return shapes
