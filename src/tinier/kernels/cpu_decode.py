"""One decode step on the CPU in one native call: a new token for each of M sequences.

Start at `CpuDecoder`: made once from `DecodeWeights`, its `step` runs the whole decoder, which
cpu_decode.cpp has. `unsupported` says beforehand why a model cannot run so. native.py compiles it.

The weights are read where they are, none is copied: [out, in] in bf16, INT8, E4M3 or E5M2, and INT4 in
pairs, the layout of native.pack_int4.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinier.errors import TinierError
from tinier.families import Geometry
from tinier.kernels.layer import Layer
from tinier.kernels.linear import (
    DenseLinear,
    Fp8NativeLinear,
    Int4NativeLinear,
    Int8Linear,
    Linear,
    StackedLinear,
)
from tinier.kernels.native import load_library
from tinier.kernels.reference import Cache

_BF16, _INT8, _INT4, _E4M3, _E5M2 = range(5)
_AS_THEY_ARE, _BY_TOKEN, _STATIC = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWeights:
    """What the step needs of a decoder."""

    geometry: Geometry
    embedding: Tensor
    layers: Sequence[Layer]
    final_norm: Tensor
    head: Linear


class _Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "zero", "sums", "bias")),
        *((name, c_int32) for name in ("out", "in", "format", "group", "rounding")),
        ("input_scale", c_float),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (
            "input_norm", "attention_out_norm", "post_norm", "mlp_out_norm", "q_norm", "k_norm",
        )),
        *((name, _Linear) for name in ("q", "k", "v", "out", "gate", "up", "down", "router")),
        ("experts", POINTER(_Linear)),
        *((name, c_void_p) for name in ("keys", "values", "cos", "sin")), ("window", c_int32),
    )  # fmt: skip


class _Model(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("embedding", "final_norm")),
        ("layers", POINTER(_Layer)), ("head", _Linear),
        *((name, c_int32) for name in (
            "num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "block_size",
            "threads", "turning", "norms_in_float32", "rope_in_float32", "norms_all_heads", "gelu",
            "experts", "chosen", "shares_sum_to_one", "shares_in_float32",
        )),
        *((name, c_float) for name in (
            "eps", "times_embedding", "times_residual", "times_attention", "logits_by"
        )),
    )  # fmt: skip


class _Batch(Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("tokens", "positions", "slots", "contexts", "tables", "logits")),
        ("rows", c_int32), ("width", c_int32),
    )  # fmt: skip


class CpuDecoder:
    """A decoder and its cache, ready for `step`. It reads the tensors that it was made from in place."""

    def __init__(
        self,
        weights: DecodeWeights,
        caches: Sequence[Cache],
        rotations: Sequence[tuple[Tensor, Tensor]],
        block_size: int,
    ) -> None:
        """caches: each layer's, in bf16. rotations: each layer's cos and sin of every position, each
        [positions, R], bf16, or float32 where the family multiplies so. block_size: slots in one cache
        block."""
        reason = unsupported(weights, caches[0].keys.dtype)
        library = load_library()
        if reason is not None or isinstance(library, str):
            raise TinierError(f"no native decode step: {reason}")
        self._library = library
        self._kept: list[Tensor] = []  # whatever the structs point into
        self._vocab = _rows(weights.head)
        w, g, m = weights, weights.geometry, weights.geometry.multipliers
        layers = [self._layer(g, *parts) for parts in zip(w.layers, caches, rotations, strict=True)]
        self._model = _Model(
            self._at(w.embedding), self._at(w.final_norm),
            (_Layer * len(layers))(*layers), self._linears(w.head, [self._vocab], g.hidden)[0],
            len(layers), g.hidden, g.intermediate, g.heads, g.kv_heads, g.head_dim, block_size,
            torch.get_num_threads(), g.turning, g.norms_in_float32, g.rope_in_float32,
            g.head_norms == "all", g.activation == "gelu_tanh", g.experts, g.top_k,
            g.shares_sum_to_one, g.mixture is not None and g.mixture.in_float32,
            g.norm_eps, m.embedding, m.residual,
            g.head_dim**-0.5 if m.attention is None else m.attention, m.logits,
        )  # fmt: skip

    def step(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, contexts: Tensor, tables: Tensor
    ) -> Tensor:
        """Logits [M, vocab] in bf16 after one new token of each of M sequences, whose keys and values
        are written to the cache.

        All int32 on the CPU. tokens, positions, slots: [M]. contexts: [M], tokens in the cache, the new
        one counted. tables: [M, width] cache blocks. Row i is the same whatever the others are.
        """
        rows = tokens.shape[0]
        inputs = [t.contiguous() for t in (tokens, positions, slots, contexts, tables)]
        assert all(t.dtype == torch.int32 and t.shape[0] == rows for t in inputs)
        logits = torch.empty(rows, self._vocab, dtype=torch.bfloat16)
        if rows:
            batch = _Batch(*(t.data_ptr() for t in (*inputs, logits)), rows, tables.shape[1])
            self._library.decode_step(ctypes.byref(self._model), ctypes.byref(batch))
        return logits

    def _layer(
        self, g: Geometry, layer: Layer, cache: Cache, rotation: tuple[Tensor, Tensor]
    ) -> _Layer:
        q, kv, hidden, inner = (
            g.heads * g.head_dim,
            g.kv_heads * g.head_dim,
            g.hidden,
            g.intermediate,
        )
        return _Layer(
            *map(self._at, (
                layer.input_norm, layer.attention_out_norm, layer.post_norm, layer.mlp_out_norm,
                layer.q_norm, layer.k_norm,
            )),
            *self._linears(layer.qkv, [q, kv, kv], hidden), *self._linears(layer.out, [hidden], q),
            *self._mlp(layer.gate_up, layer.down, hidden, inner), *self._experts(layer, hidden, inner),
            self._at(cache.keys), self._at(cache.values), *map(self._at, rotation), cache.window or 0,
        )  # fmt: skip

    def _mlp(
        self, gate_up: Linear | None, down: Linear | None, hidden: int, inner: int
    ) -> list[_Linear]:
        """Gate, up and down; empty ones where there are experts instead."""
        if gate_up is None or down is None:
            return [_Linear(), _Linear(), _Linear()]
        return [
            *self._linears(gate_up, [inner, inner], hidden),
            *self._linears(down, [hidden], inner),
        ]

    def _experts(self, layer: Layer, hidden: int, inner: int) -> tuple[_Linear, Any]:
        """The router, and gate, up and down of each expert."""
        experts = layer.experts
        if experts is None:
            return _Linear(), None
        pairs = zip(experts.gate_up, experts.down, strict=True)
        parts = [part for pair in pairs for part in self._mlp(*pair, hidden, inner)]
        (router,) = self._linears(experts.router, [experts.count], hidden)
        return router, (_Linear * len(parts))(*parts)

    def _at(self, tensor: Tensor | None) -> int | None:
        """Address of a tensor that is kept from now on."""
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linears(self, linear: Linear, sizes: list[int], columns: int) -> list[_Linear]:
        """The rows of a fused layer as one layer for each of `sizes`."""
        if isinstance(linear, StackedLinear):
            parts = zip(linear.parts, sizes, strict=True)
            return [self._linears(part, [rows], columns)[0] for part, rows in parts]
        weight, scale, zero, sums, kind = _stored(linear)
        self._library.use_huge_pages(c_void_p(weight.data_ptr()), c_int64(weight.nbytes))
        group = columns // scale.shape[1] if scale is not None and kind == _INT4 else 0
        split = [
            [None] * len(sizes) if t is None else t.split(sizes)
            for t in (weight, scale, zero, sums, linear.bias)
        ]
        return [
            _Linear(*map(self._at, part), rows, columns, kind, group, *_rounding(linear))
            for *part, rows in zip(*split, sizes, strict=True)
        ]


def _rounding(linear: Linear) -> tuple[int, float]:
    """How the inputs of a layer of 8-bit floats are rounded, and their scale where it is known."""
    if not isinstance(linear, Fp8NativeLinear) or linear.activations is None:
        return _AS_THEY_ARE, 1.0
    if linear.input_scale is None:
        return _BY_TOKEN, 1.0
    return _STATIC, float(linear.input_scale)


def unsupported(weights: DecodeWeights, cache_dtype: torch.dtype) -> str | None:
    """Why this model has no native step here; None: it has one."""
    if weights.embedding.device.type != "cpu" or weights.embedding.dtype != torch.bfloat16:
        return "it computes in bf16 on a CPU"
    if cache_dtype != torch.bfloat16:
        return "keys and values must be cached in bf16"
    library = load_library()
    if isinstance(library, str):
        return library
    g = weights.geometry
    if g.hidden % 32 or g.head_dim % 16 or g.turning % 16:
        return "the hidden size must be a multiple of 32, that of a head, and of its part that turns, of 16"
    linears = [linear for layer in weights.layers for linear in layer.linears]
    routers = [layer.experts.router for layer in weights.layers if layer.experts is not None]
    for linear in (*linears, *routers, weights.head):
        reason = _unsupported_linear(linear)
        if reason is not None:
            return reason
    return None


def _unsupported_linear(linear: Linear) -> str | None:
    if isinstance(linear, StackedLinear):
        floats = [part for part in linear.parts if isinstance(part, Fp8NativeLinear)]
        if len({_rounding(part) for part in floats if _stored(part)[-1] == _E4M3}) > 1:
            return "layers that share an input round it in different ways"
        return next(filter(None, map(_unsupported_linear, linear.parts)), None)
    dense = isinstance(linear, DenseLinear) and linear.activations is None
    if not (dense or isinstance(linear, Int8Linear | Int4NativeLinear | Fp8NativeLinear)):
        return f"{linear.path} is not among its formats"
    weight, scale, *_, kind = _stored(linear)
    if kind == _BF16 and weight.dtype != torch.bfloat16:
        return f"a layer has weights in {weight.dtype}"
    columns = weight.shape[1] * (2 if kind == _INT4 else 1)
    if columns % (64 if kind == _INT4 else 32):
        return f"a layer has {columns} inputs, no multiple of 32 (INT4: 64)"
    if kind == _INT4:
        assert scale is not None
        group = columns // scale.shape[1]
        if group != 32 and group % 64:
            return f"INT4 groups of {group} columns are neither 32 nor a multiple of 64"
    return None


def _rows(linear: Linear) -> int:
    """Outputs of a layer."""
    if isinstance(linear, StackedLinear):
        return sum(map(_rows, linear.parts))
    return _stored(linear)[0].shape[0]


def _stored(linear: Linear) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """weight, scale, zero, sums and format, as the struct Linear of cpu_decode.cpp has them."""
    if isinstance(linear, DenseLinear):
        return linear.weight, None, None, None, _BF16
    if isinstance(linear, Int8Linear):
        codes = linear.codes.t()
        return codes, linear.scale, None, codes.sum(dim=1, dtype=torch.int32), _INT8
    if isinstance(linear, Fp8NativeLinear):
        kind = _E4M3 if linear.codes.dtype == torch.float8_e4m3fn else _E5M2
        return linear.codes, linear.scale, None, None, kind
    assert isinstance(linear, Int4NativeLinear)
    return *linear.weight, None, _INT4
