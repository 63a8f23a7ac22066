"""NVIDIA ModelOpt's unified checkpoint, which TensorRT-LLM, vLLM and SGLang read.

config.json has a `quantization_config` with `quant_method: modelopt`; `hf_quant_config.json` says the same
for TensorRT-LLM. Tensors of a linear layer, scales in float32:

- FP8: `weight` E4M3 [out, in], `weight_scale` and `input_scale`, a number each
- FP8_PER_CHANNEL_PER_TOKEN: `weight` E4M3, `weight_scale` [out]
- fp8_pb_wo, which is written in small letters: `weight` E4M3, `weight_scale` [out/128, 1, in/128, 1]
- NVFP4: `weight` uint8 [out, in/2], the even column in the low half; `weight_scale` E4M3 [out, in/16],
  `weight_scale_2` and `input_scale`, a number each: the inverse of compressed-tensors' global scales
- W4A16_AWQ: `weight` uint8 [out/2, in], two rows a byte, the even one in the low half, two's complement;
  `weight_scale` [out, in/group]

The KV cache's scales are `k_proj.k_scale` and `v_proj.v_scale`.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tinier.errors import CheckpointError, SchemeError
from tinier.numerics import Quantized, e2m1_codes, e2m1_values, from_pairs, to_pairs
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR, PRESETS, Grid, Layout, Scheme

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose layout it is; readers look at the name."""
_KV8 = Grid(kind="float", bits=8, granularity="tensor")
_KV_SCALE = re.compile(r"\.self_attn\.(?:[kv]_proj\.)?([kv])_scale$")


def usual_name(tensor: str) -> str:
    """A tensor's name as the stages know it: the KV cache's scales belong to the attention."""
    return _KV_SCALE.sub(r".self_attn.\1_scale", tensor)


def modelopt_name(tensor: str) -> str:
    """A tensor's name in ModelOpt's checkpoint: they belong to the layers that write the cache."""
    return _KV_SCALE.sub(r".self_attn.\1_proj.\1_scale", tensor)


def algorithm_of(scheme: Scheme) -> str | None:
    """ModelOpt's name for a scheme; None: it has none."""
    grid = scheme.weights
    if grid.kind == "int" and grid.bits == 4 and grid.symmetric and grid.granularity == "group":
        return "W4A16_AWQ" if scheme.activations is None else None
    for preset, name in (
        ("fp8-static", "FP8"), ("fp8", "FP8_PER_CHANNEL_PER_TOKEN"), ("fp8-block", "fp8_pb_wo"),
        ("nvfp4", "NVFP4"),
    ):  # fmt: skip
        if PRESETS[preset].scheme == scheme:
            return name
    return None


def modelopt_layout(block: dict[str, Any], names: Iterable[str]) -> Layout:
    """How a checkpoint with this `quantization_config` (or `quantization` of hf_quant_config.json) stores
    each of `names`, its linear layers.

    Raises CheckpointError for what tinier does not compute.
    """
    names = list(names)
    kept = [_pattern(name) for name in block.get("ignore") or block.get("exclude_modules") or []]
    left = [name for name in names if not any(pattern.fullmatch(name) for pattern in kept)]
    algorithm = block.get("quant_algo")
    schemes: dict[str, Scheme] = {}
    if algorithm == "MIXED_PRECISION":
        layers: dict[str, dict[str, Any]] = block.get("quantized_layers") or {}
        schemes = {name: _scheme(layers[name]) for name in names if name in layers}
    elif algorithm is not None:
        schemes = dict.fromkeys(left, _scheme(block))
    cache = block.get("kv_cache_scheme") or block.get("kv_cache_quant_algo")
    if cache not in (None, "FP8") and not (
        isinstance(cache, dict) and (cache.get("type"), cache.get("num_bits")) == ("float", 8)
    ):
        raise CheckpointError(
            f"the KV cache is quantized as {cache!r}; tinier runs FP8 and INT8. Give the 16-bit model."
        )
    return Layout(schemes=schemes, kv_cache=_KV8 if cache else None, storage="modelopt")


def modelopt_config(layout: Layout, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a layout, all keys that readers look at.

    Raises SchemeError for one that has no word for it.
    """
    names = list(names)
    for name, scheme in layout.schemes.items():
        if algorithm_of(scheme) is None or name in (HEAD_LINEAR, EMBEDDING_MODULE):
            trap = (
                " TensorRT-LLM reads INT8 with a scale a row as FP8: the model would be noise."
                if scheme.weights.kind == "int" and scheme.weights.bits == 8
                else ""
            )
            raise SchemeError(
                f"ModelOpt's checkpoint has no word for {scheme.label} ({name}), or its readers load none."
                f"{trap} Quantize with fp8, fp8-static, fp8-block, nvfp4, or int4-awq or int4-gptq without "
                "zero points; leave head and embedding in 16 bit."
            )
    if layout.kv_cache is not None and layout.kv_cache.kind != "float":
        raise SchemeError(
            "ModelOpt's readers take an FP8 cache, not an INT8 one. Quantize with --kv fp8."
        )
    algorithms = {name: _options(scheme) for name, scheme in layout.schemes.items()}
    block: dict[str, Any] = {"quant_method": "modelopt", "producer": PRODUCER}
    distinct = {str(options): options for options in algorithms.values()}
    if len(distinct) == 1:
        block |= next(iter(distinct.values()))
    else:
        block |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": algorithms}
    block["ignore"] = [name for name in names if name not in layout.schemes]
    block["kv_cache_quant_algo"] = "FP8" if layout.kv_cache else None
    if layout.kv_cache:
        block["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return block


def hf_quant_config(block: dict[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json, which TensorRT-LLM reads first, from `modelopt_config`."""
    values = {
        key: value
        for key, value in block.items()
        if key not in ("quant_method", "producer", "ignore", "kv_cache_scheme")
    }
    return {"producer": PRODUCER, "quantization": values | {"exclude_modules": block["ignore"]}}


def modelopt_shapes(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a linear layer [out, in]; (): a number."""
    rows, columns = shape
    grid = scheme.weights
    number: tuple[int, ...] = ()
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "FP8": {"weight": shape, "weight_scale": number, "input_scale": number},
        "FP8_PER_CHANNEL_PER_TOKEN": {"weight": shape, "weight_scale": (rows,)},
        "fp8_pb_wo": {"weight": shape, "weight_scale": _four_sides(grid.blocks(shape))},
        "NVFP4": {
            "weight": (rows, columns // 2), "weight_scale": grid.blocks(shape),
            "weight_scale_2": number, "input_scale": number,
        },
        "W4A16_AWQ": {"weight": (-(-rows // 2), columns), "weight_scale": grid.blocks(shape)},
    }  # fmt: skip
    return shapes[algorithm_of(scheme) or ""]


def modelopt_pack(
    quantized: Quantized, scheme: Scheme, input_scale: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of one linear layer by their names. Raises SchemeError for an odd number of INT4 rows."""
    algorithm, scale = algorithm_of(scheme), quantized.scale
    if algorithm == "W4A16_AWQ":
        codes = quantized.codes.cpu()
        if len(codes) % 2:
            raise SchemeError(
                f"a layer has {len(codes)} outputs, and ModelOpt's INT4 packs two in a byte. Choose "
                "another format: tinier export --matrix"
            )
        pairs = (codes[::2] & 15) | (codes[1::2] << 4)
        return {"weight": pairs.view(torch.uint8), "weight_scale": scale.float()}
    if algorithm == "NVFP4":
        assert quantized.global_scale is not None
        assert input_scale is not None
        return {
            "weight": to_pairs(e2m1_codes(quantized.codes)), "weight_scale": scale,
            "weight_scale_2": (1 / quantized.global_scale.float()).reshape(()),
            "input_scale": (1 / input_scale.float()).reshape(()),
        }  # fmt: skip
    packed = {"weight": quantized.codes, "weight_scale": scale.float()}
    if algorithm == "FP8":
        assert input_scale is not None
        packed["weight_scale"] = scale.float().reshape(())
        packed["input_scale"] = input_scale.float().reshape(())
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        packed["weight_scale"] = scale.float().reshape(-1)
    if algorithm == "fp8_pb_wo":
        packed["weight_scale"] = scale.float().reshape(_four_sides(tuple(scale.shape)))
    return packed


def modelopt_unpack(
    read: Callable[[str], Tensor | None], name: str, scheme: Scheme
) -> tuple[Quantized, Tensor | None]:
    """Codes and input scale of the linear layer `name`."""
    weight, scale = read(f"{name}.weight"), read(f"{name}.weight_scale")
    assert weight is not None
    assert scale is not None
    algorithm, inputs = algorithm_of(scheme), read(f"{name}.input_scale")
    if algorithm == "W4A16_AWQ":
        rows = torch.stack((weight << 4, weight), dim=1).view(torch.int8) >> 4
        return Quantized(rows.flatten(0, 1), scale), None
    if algorithm == "NVFP4":
        second = read(f"{name}.weight_scale_2")
        assert second is not None
        assert inputs is not None
        divisor = 1 / second.float().reshape(1)
        codes = e2m1_values(from_pairs(weight))
        return Quantized(codes, scale, None, divisor), 1 / inputs.float().reshape(1)
    if algorithm == "FP8":
        assert inputs is not None
        return Quantized(weight, scale.reshape(1, 1)), inputs.reshape(1)
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        scale = scale.reshape(-1, 1)
    if algorithm == "fp8_pb_wo":
        scale = scale.reshape(scale.shape[::2])
    return Quantized(weight, scale), None


def _four_sides(blocks: tuple[int, ...]) -> tuple[int, ...]:
    return (blocks[0], 1, blocks[1], 1)


def _options(scheme: Scheme) -> dict[str, Any]:
    algorithm = algorithm_of(scheme)
    options: dict[str, Any] = {"quant_algo": algorithm}
    if algorithm == "W4A16_AWQ":
        # the factors that AWQ found are in the weights and the norms
        options |= {
            "group_size": scheme.weights.group_size,
            "has_zero_point": False,
            "pre_quant_scale": False,
        }
    if algorithm == "NVFP4":
        options["group_size"] = 16
    return options


def _scheme(options: dict[str, Any]) -> Scheme:
    algorithm = options.get("quant_algo")
    if algorithm == "FP8_PB_WO":  # as its documentation has it
        algorithm = "fp8_pb_wo"
    presets = {
        "FP8": "fp8-static", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "fp8_pb_wo": "fp8-block", "NVFP4": "nvfp4",
    }  # fmt: skip
    if algorithm in presets:
        return PRESETS[presets[algorithm]].scheme
    if algorithm == "W4A16_AWQ" and not options.get("has_zero_point"):
        size = options.get("group_size") or 128
        return Scheme(weights=Grid(kind="int", bits=4, granularity="group", group_size=size))
    raise CheckpointError(
        f"ModelOpt quantized the model with {algorithm!r}; tinier reads {', '.join(presets)} and W4A16_AWQ "
        "without zero points. Give the 16-bit model."
    )


def _pattern(name: str) -> re.Pattern[str]:
    """Of names with * for any part."""
    return re.compile(re.escape(name).replace(r"\*", ".*"))
