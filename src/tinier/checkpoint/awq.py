"""AutoAWQ's GEMM layout.

`qweight` int32 [in, out/8]: eight outputs' codes a word, in the order 0, 2, 4, 6, 1, 3, 5, 7, the first
in the lowest bits; `qzeros` int32 [groups, out/8] in the same order; `scales` float16 [groups, out]. A
weight is (code - zero) · scale, both from 0 to 15.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tinier.checkpoint.gptq import float16_scale
from tinier.errors import CheckpointError, SchemeError
from tinier.numerics import Quantized
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR, Grid, Layout, Scheme

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_layout(block: dict[str, Any], names: Iterable[str]) -> Layout:
    """How a checkpoint with this `quantization_config` stores each of `names`, its linear layers.

    Raises CheckpointError for what tinier does not compute.
    """
    bits = block.get("bits", block.get("w_bit"))
    size = block.get("group_size", block.get("q_group_size"))
    version = str(block.get("version", "gemm")).lower()
    if bits != 4 or not size or size < 1 or version != "gemm":
        raise CheckpointError(
            f"an AWQ checkpoint with bits={bits!r}, group_size={size!r}, version={version!r}; tinier reads "
            "4 bits in groups, version gemm. Give the 16-bit model."
        )
    grid = Grid(
        kind="int", bits=4, granularity="group", group_size=size,
        symmetric=not block.get("zero_point", True),
    )  # fmt: skip
    schemes = dict.fromkeys(converted(block, names), Scheme(weights=grid))
    return Layout(schemes=schemes, storage="awq")


def converted(block: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that no part of a name in transformers' `modules_to_not_convert` excludes, nor the
    head, which it never converts."""
    kept = [*(block.get("modules_to_not_convert") or []), HEAD_LINEAR]
    return [name for name in names if not any(part in name for part in kept)]


def awq_config(layout: Layout, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a layout. Raises SchemeError for one that has no word for it."""
    schemes = set(layout.schemes.values())
    scheme = next(iter(schemes))
    grid, ends = scheme.weights, {HEAD_LINEAR, EMBEDDING_MODULE} & layout.schemes.keys()
    fits = grid.kind == "int" and grid.bits == 4 and grid.group_size and scheme.activations is None
    if len(schemes) != 1 or layout.kv_cache is not None or ends or not fits:
        raise SchemeError(
            "an AWQ checkpoint has INT4 in groups in all its layers, 16-bit activations, and head, "
            f"embedding and KV cache in 16 bit; this one is {layout.label}. Quantize with int4-awq, "
            "int4-gptq, int4-best or int4."
        )
    left = [name for name in names if name not in layout.schemes]
    return {
        "quant_method": "awq", "bits": 4, "group_size": grid.group_size, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": left,
    }  # fmt: skip


def awq_shapes(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a linear layer [out, in]."""
    rows, columns = shape
    groups = scheme.weights.blocks(shape)[1]
    words = -(-rows // 8)
    return {"qweight": (columns, words), "qzeros": (groups, words), "scales": (groups, rows)}


def awq_pack(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear layer by their names. Raises SchemeError for a scale that float16 lacks, or
    a number of outputs that 8 does not divide."""
    rows = quantized.codes.shape[0]
    if rows % 8:
        raise SchemeError(
            f"a layer has {rows} outputs, and AWQ's format packs 8 in a word. Choose another format: "
            "tinier export --matrix"
        )
    zero = quantized.zero_point
    if zero is None:
        zero = torch.zeros(quantized.scale.shape, dtype=torch.int8)
    return {
        "qweight": _words(quantized.codes.cpu().t()),
        "qzeros": _words(zero.cpu().t()),
        "scales": float16_scale(quantized.scale).t().contiguous(),
    }


def awq_unpack(read: Callable[[str], Tensor | None], name: str, scheme: Scheme) -> Quantized:
    """Codes and scales of the linear layer `name`."""
    words, zeros, scales = (read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
    assert words is not None
    assert zeros is not None
    assert scales is not None
    zero = None if scheme.weights.symmetric else _codes(zeros).t().contiguous()
    return Quantized(_codes(words).t().contiguous(), scales.t().contiguous(), zero)


def _words(codes: Tensor) -> Tensor:
    """Codes [n, out] of -8..7 as words [n, out/8]."""
    eights = (codes.int() + 8).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4)
    words = (eights[:, :, list(_ORDER)].long() << shifts).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _codes(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    shifts = torch.arange(0, 32, 4, device=words.device)
    nibbles = (words.unsqueeze(2) >> shifts) & 15
    place = torch.tensor([_ORDER.index(i) for i in range(8)], device=words.device)
    return (nibbles[:, :, place].flatten(1) - 8).to(torch.int8)
