"""The native decode step, against the same decoder written with reference.py."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.kernels import StoredLinear, cpu_decode, make_linear
from tinier.kernels.cpu_decode import CpuDecoder, DecodeWeights, LayerWeights, pack_int4, unsupported
from tinier.kernels.linear import DenseLinear, Int4CpuLinear, Linear, StackedLinear
from tinier.kernels.reference import rms_norm, rotate, silu_mul
from tinier.numerics import Quantized, dequantize
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.schemes import preset_named

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK = 128, 192, 6, 2, 48, 77, 4

pytestmark = pytest.mark.skipif(
    isinstance(cpu_decode.load_library(), str), reason=str(cpu_decode.load_library())
)


class Int4Both(Int4CpuLinear):
    """torch's packed weights, and the codes for the native step."""

    def __init__(self, quantized: Quantized, group_size: int, bias: Tensor | None) -> None:
        super().__init__(quantized, group_size, bias)
        self.native = pack_int4(quantized)


def make(kind: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
    """A random layer. kind: bf16, int8, int4-GROUP, or int4-GROUP-asymmetric."""
    weight = torch.randn(rows, columns, dtype=torch.bfloat16) * columns**-0.5
    added = torch.randn(rows, dtype=torch.bfloat16) * 0.3 if bias else None
    if kind == "bf16":
        return make_linear([StoredLinear(weight, added)], torch.bfloat16)
    name, *rest = kind.split("-")
    group = int(rest[0]) if rest else None
    scheme = preset_named(name, group, symmetric="asymmetric" not in rest).scheme
    quantized = round_nearest(weight, absmax_scales(weight, scheme.weights, torch.bfloat16), scheme.weights)
    if name == "int8":
        return make_linear([StoredLinear(quantized, added, scheme)], torch.bfloat16)
    assert group is not None
    layer = Int4Both(quantized, group, added)
    if rows % 16:  # which torch cannot pack
        layer.dense = DenseLinear(dequantize(quantized, torch.bfloat16), added, None)
    return layer


def random_weights(
    kind: str = "bf16", head: str = "bf16", *, bias: bool = False, qk_norm: bool = False,
    window: int | None = None,
) -> DecodeWeights:  # fmt: skip
    torch.manual_seed(0)

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, dtype=torch.bfloat16)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=norm(HIDDEN),
            qkv=make(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, bias=bias),
            q_norm=norm(HEAD_DIM) if qk_norm else None,
            k_norm=norm(HEAD_DIM) if qk_norm else None,
            out=make("bf16" if kind.startswith("int4") else kind, HIDDEN, HEADS * HEAD_DIM, bias=bias),
            post_norm=norm(HIDDEN),
            gate_up=make(kind, 2 * INNER, HIDDEN, bias=bias),
            down=make(kind, HIDDEN, INNER, bias=bias),
            window=window,
        )

    return DecodeWeights(
        embedding=torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16),
        layers=[layer(), layer()],
        final_norm=norm(HIDDEN),
        head=make(head, VOCAB, HIDDEN),
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        norm_eps=1e-5,
    )
