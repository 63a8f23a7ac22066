"""The compressed-tensors layout of quantized weights, which transformers, vLLM and SGLang load.

`quantization_config` writes the block of config.json, `scheme_of` reads it back into a Scheme, and
`pack_linear` lays out the tensors of one linear layer. Schema and packing are the package's own.
"""

from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from tinier.errors import CheckpointError
from tinier.numerics import Quantized
from tinier.schemes import Grid, Scheme


def storage_format(scheme: Scheme) -> str:
    """compressed-tensors' name for how the codes lie on disk."""
    if scheme.weights.kind == "float":
        return "float-quantized"
    return "int-quantized" if scheme.weights.bits == 8 else "pack-quantized"


def quantization_config(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: every Linear but those in `ignore`."""
    layout = storage_format(scheme)
    group = QuantizationScheme(
        targets=["Linear"],
        weights=_to_args(scheme.weights, dynamic=False),
        input_activations=_to_args(scheme.activations, dynamic=True)
        if scheme.activations
        else None,
        format=layout,
    )
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=layout,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped


def scheme_of(config: dict[str, Any]) -> Scheme | None:
    """The scheme of a checkpoint's linear layers from its config.json; None if not quantized.

    Raises CheckpointError for another quantization method, or a format that tinier cannot run.
    """
    block = config.get("quantization_config")
    if block is None:
        return None
    method = block.get("quant_method")
    if method != "compressed-tensors":
        raise CheckpointError(
            f"the model is quantized with {method!r}; tinier reads compressed-tensors. "
            "Give the original 16-bit model."
        )
    groups = list(block.get("config_groups", {}).values())
    if len(groups) != 1:
        raise CheckpointError(
            f"the model mixes {len(groups)} quantization schemes; give one of one."
        )
    weights, activations = groups[0].get("weights"), groups[0].get("input_activations")
    scheme = Scheme(
        weights=_to_grid(weights, dynamic=False),
        activations=_to_grid(activations, dynamic=True) if activations else None,
    )
    if block.get("kv_cache_scheme"):
        raise CheckpointError("the model has a quantized KV cache, which tinier does not run.")
    return scheme


def pack_linear(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors of one linear layer by the name they have on disk, without the layer's prefix.

    8 bits: `weight` [out, in] int8 or float8_e4m3fn. 4 bits: `weight_packed` [out, in/8] int32 and
    `weight_shape` [2]. Both: `weight_scale` [out, groups].
    """
    codes, scale = quantized
    if scheme.weights.bits == 8:
        return {"weight": codes, "weight_scale": scale}
    return {
        "weight_packed": pack_to_int32(codes, scheme.weights.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }


def _to_args(grid: Grid, *, dynamic: bool) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=grid.bits,
        type=grid.kind,
        symmetric=True,
        strategy=grid.granularity,
        group_size=grid.group_size,
        dynamic=dynamic,
    )


def _to_grid(args: dict[str, Any], *, dynamic: bool) -> Grid:
    supported = {
        "symmetric": args.get("symmetric", True) is True,
        "dynamic": bool(args.get("dynamic", False)) is dynamic,
        "num_bits": args.get("num_bits") in ((8,) if args.get("type") == "float" else (4, 8)),
        "strategy": args.get("strategy")
        == ("token" if dynamic else "group" if args.get("num_bits") == 4 else "channel"),
        "actorder": args.get("actorder") is None,
    }
    wrong = [name for name, good in supported.items() if not good]
    if wrong:
        values = ", ".join(f"{name}={args.get(name)!r}" for name in wrong)
        raise CheckpointError(
            f"the model is quantized with {values}, which this tinier cannot run. It runs symmetric "
            "8-bit channel and 4-bit group weights, with 16-bit or dynamic per-token activations."
        )
    return Grid(
        kind=args["type"],
        bits=args["num_bits"],
        granularity=args["strategy"],
        group_size=args.get("group_size") if args["strategy"] == "group" else None,
    )
