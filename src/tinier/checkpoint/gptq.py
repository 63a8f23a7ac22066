"""GPTQ's layout, as AutoGPTQ and GPTQModel write it and most engines read it.

`qweight` int32 [in·bits/32, out] holds a column's codes along the inputs, the first in the lowest bits;
`qzeros` int32 [groups, out·bits/32] the codes of zero along the outputs; `scales` [groups, out]; `g_idx`
int32 [in] each input's group. A weight is (code - zero) · scale, codes counted from 0.
`checkpoint_format: gptq` stores each zero less one, `gptq_v2` as it is.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tinier.checkpoint.compressed import pack_integers, unpack_integers
from tinier.errors import CheckpointError, SchemeError
from tinier.numerics import Quantized
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR, Grid, Layout, Scheme

_BITS = (2, 3, 4, 8)


def gptq_layout(block: dict[str, Any], names: Iterable[str]) -> Layout:
    """How a checkpoint with this `quantization_config` stores each of `names`, its linear layers.

    Raises CheckpointError for what tinier does not compute.
    """
    bits, size = block.get("bits"), block.get("group_size")
    version = block.get("checkpoint_format") or "gptq"
    dynamic: dict[str, Any] = block.get("dynamic") or {}
    kept = [pattern.removeprefix("-:") for pattern in dynamic]
    plain = (
        bits in _BITS
        and version in ("gptq", "gptq_v2")
        and block.get("pack_dtype", "int32") == "int32"
        and all(pattern.startswith("-:") for pattern in dynamic)
    )
    if not plain:
        raise CheckpointError(
            f"a GPTQ checkpoint with bits={bits!r}, checkpoint_format={version!r}, dynamic={dynamic!r:.80}"
            f"; tinier reads {_BITS} bits in int32 words, all layers alike. Give the 16-bit model."
        )
    grid = Grid(
        kind="int", bits=bits,  # type: ignore[arg-type]
        granularity="group" if size and size > 0 else "channel",
        group_size=size if size and size > 0 else None, symmetric=bool(block.get("sym", True)),
    )  # fmt: skip
    quantized = [
        name
        for name in names
        if (name != HEAD_LINEAR or block.get("lm_head"))
        and not any(re.match(pattern, name) for pattern in kept)
    ]
    schemes = dict.fromkeys(quantized, Scheme(weights=grid))
    return Layout(schemes=schemes, storage="gptq" if version == "gptq" else "gptq_v2")


def gptq_config(layout: Layout, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a layout. Raises SchemeError for one that has no word for it."""
    schemes = set(layout.schemes.values())
    grid = next(iter(schemes)).weights
    if len(schemes) != 1 or layout.kv_cache is not None or EMBEDDING_MODULE in layout.schemes:
        reason = "all its layers in one format, and embedding and KV cache in 16 bit"
    elif any(scheme.activations is not None for scheme in schemes) or grid.kind != "int":
        reason = "integers in groups, and 16-bit activations"
    elif not grid.symmetric or not grid.group_size:
        reason = "groups, without zero points"
    else:
        reason = None
    if reason is not None:
        raise SchemeError(
            f"a GPTQ checkpoint has {reason}; this one is {layout.label}. Quantize with int4-gptq, "
            "int4-best, int4-awq, int4, int3 or int2."
        )
    left = [name for name in names if name not in layout.schemes and name != HEAD_LINEAR]
    return {
        "quant_method": "gptq", "bits": grid.bits, "group_size": grid.group_size, "sym": True,
        "desc_act": False, "static_groups": False, "true_sequential": True, "damp_percent": 0.01,
        "lm_head": HEAD_LINEAR in layout.schemes, "checkpoint_format": layout.storage,
        "dynamic": {f"-:{re.escape(name)}$": {} for name in left},
    }  # fmt: skip


def gptq_shapes(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a linear layer [out, in], `g_idx` aside."""
    rows, columns = shape
    bits, groups = scheme.weights.bits, scheme.weights.blocks(shape)[1]
    return {
        "qweight": (-(-columns * bits // 32), rows),
        "qzeros": (groups, -(-rows * bits // 32)),
        "scales": (groups, rows),
    }


def gptq_pack(quantized: Quantized, scheme: Scheme, *, v2: bool) -> dict[str, Tensor]:
    """The tensors of one linear layer by their names. Raises SchemeError for a scale that float16 lacks."""
    bits, columns = scheme.weights.bits, quantized.codes.shape[1]
    groups = quantized.scale.shape[1]
    zero = torch.full(quantized.scale.shape, 0 if v2 else -1, dtype=torch.int8)  # less 2^(bits - 1)
    return {
        "qweight": pack_integers(quantized.codes.cpu(), bits).t().contiguous(),
        "qzeros": pack_integers(zero.t().contiguous(), bits),
        "scales": float16_scale(quantized.scale).t().contiguous(),
        "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }


def gptq_unpack(
    read: Callable[[str], Tensor | None], name: str, scheme: Scheme, *, v2: bool
) -> Quantized:
    """Codes and scales of the linear layer `name`. Raises CheckpointError where its groups are not in
    order (desc_act)."""
    words, zeros, scales = (read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
    assert words is not None
    assert zeros is not None
    assert scales is not None
    bits, (groups, rows) = scheme.weights.bits, scales.shape
    columns = words.shape[0] * 32 // bits
    order = read(f"{name}.g_idx")
    expected = torch.arange(columns, device=words.device) // (columns // groups)
    if order is not None and not torch.equal(order.long(), expected):
        raise CheckpointError(
            f"{name} has its inputs in another order than their groups (desc_act), which tinier does not "
            "multiply. Give the 16-bit model, or one that was quantized without desc_act."
        )
    codes = unpack_integers(words.t().contiguous(), bits, torch.Size((rows, columns)))
    zero = unpack_integers(zeros, bits, torch.Size((groups, rows))).t()
    half = 1 << (bits - 1)
    if not v2:
        zero = (zero.int() + half + 1).remainder(1 << bits).sub(half).to(torch.int8)
    scale = scales.t().contiguous()
    if not scheme.weights.symmetric:
        return Quantized(codes, scale, zero.contiguous())
    if zero.any():
        raise CheckpointError(
            f"{name} has zero points, and config.json says that it has none (sym). Download the model "
            "again, or give the 16-bit model."
        )
    return Quantized(codes, scale)


def float16_scale(scale: Tensor) -> Tensor:
    """The scale in float16, the same numbers. Raises SchemeError where float16 lacks one."""
    narrow = scale.cpu().half()
    if not torch.equal(narrow.float(), scale.cpu().float()):
        raise SchemeError(
            "a scale is beyond float16's range or between its numbers, and this format has scales in "
            "float16. Quantize a bfloat16 or float16 model with weights of the usual sizes."
        )
    return narrow
