"""One step on the CPU in one native call: new tokens of some sequences, one each or a prompt's.

Start at `CpuDecoder`: made once from `DecodeWeights`, its `step` runs the whole decoder, which
cpu_decode.cpp has. `unsupported` says beforehand why a model cannot run so. native.py compiles it.

The weights are read where they are, none is copied: [out, in] in bf16, INT8, E4M3 or E5M2, and INT4 in
pairs, the layout of native.pack_int4.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from tinier.errors import TinierError
from tinier.families import Geometry
from tinier.kernels import native
from tinier.kernels.layer import DecodeWeights, Layer
from tinier.kernels.linear import (
    DenseLinear,
    Int8Linear,
    Linear,
    NativeLinear,
    StackedLinear,
)
from tinier.kernels.native import LinearStruct, NativeWeight, load_library
from tinier.kernels.reference import Cache


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (
            "input_norm", "attention_out_norm", "post_norm", "mlp_out_norm", "q_norm", "k_norm",
        )),
        *((name, LinearStruct) for name in ("q", "k", "v", "out", "gate", "up", "down", "router")),
        ("experts", POINTER(LinearStruct)),
        *((name, c_void_p) for name in ("keys", "values", "cos", "sin")), ("window", c_int32),
    )  # fmt: skip


class _Model(Structure):
    _fields_ = (
        ("final_norm", c_void_p),
        ("layers", POINTER(_Layer)), ("head", LinearStruct),
        *((name, c_int32) for name in (
            "num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "block_size",
            "threads", "turning", "norms_in_float32", "rope_in_float32", "norms_all_heads", "gelu",
            "experts", "chosen", "shares_sum_to_one", "shares_in_float32",
        )),
        *((name, c_float) for name in (
            "eps", "times_residual", "times_attention", "logits_by"
        )),
    )  # fmt: skip


class _Batch(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (
            "entering", "positions", "slots", "starts", "tables", "logits", "hidden",
        )),
        *((name, c_int32) for name in ("rows", "sequences", "width")),
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
        self._weights: list[Tensor] = []
        self._vocab, self._hidden = _rows(weights.head), weights.geometry.hidden
        w, g, m = weights, weights.geometry, weights.geometry.multipliers
        layers = [self._layer(g, *parts) for parts in zip(w.layers, caches, rotations, strict=True)]
        self._model = _Model(
            self._at(w.final_norm),
            (_Layer * len(layers))(*layers), self._linears(w.head, [self._vocab], g.hidden)[0],
            len(layers), g.hidden, g.intermediate, g.heads, g.kv_heads, g.head_dim, block_size,
            torch.get_num_threads(), g.turning, g.norms_in_float32, g.rope_in_float32,
            g.head_norms == "all", g.activation == "gelu_tanh", g.experts, g.top_k,
            g.shares_sum_to_one, g.mixture is not None and g.mixture.in_float32,
            g.norm_eps, m.residual,
            g.head_dim**-0.5 if m.attention is None else m.attention, m.logits,
        )  # fmt: skip
        self._use_huge_pages()

    def step(
        self, entering: Tensor, positions: Tensor, slots: Tensor, starts: Tensor, tables: Tensor, *,
        hidden: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits [S, vocab] in bf16 after the last of some new tokens of each of S sequences, whose keys
        and values are written to the cache; hidden: and the hidden states [T, hidden] after all of them.

        On the CPU. entering: [T, hidden] in bf16, what enters the first layer. The others int32. positions,
        slots: [T], those of a sequence one after the other. starts: [S + 1], where each begins. tables: [S,
        width] cache blocks. What is computed for a token is the same whatever else the step has.
        """
        rows, sequences = entering.shape[0], tables.shape[0]
        inputs = [t.contiguous() for t in (entering, positions, slots, starts, tables)]
        assert all(t.dtype == torch.int32 for t in inputs[1:])
        assert entering.dtype == torch.bfloat16
        assert starts.shape[0] == sequences + 1
        logits = torch.empty(sequences, self._vocab, dtype=torch.bfloat16)
        states = torch.empty(rows, self._hidden, dtype=torch.bfloat16) if hidden else None
        if rows:
            pointers = [t.data_ptr() for t in (*inputs, logits)]
            to = None if states is None else states.data_ptr()
            batch = _Batch(*pointers, to, rows, sequences, tables.shape[1])
            self._library.decode_step(ctypes.byref(self._model), ctypes.byref(batch))
        return logits, states

    def _use_huge_pages(self) -> None:
        """Ask for them, which the first token does not wait for."""
        count = len(self._weights)
        begins = (c_void_p * count)(*(weight.data_ptr() for weight in self._weights))
        sizes = (c_int64 * count)(*(weight.nbytes for weight in self._weights))
        self._library.use_huge_pages(begins, sizes, c_int32(count))

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
    ) -> list[LinearStruct]:
        """Gate, up and down; empty ones where there are experts instead."""
        if gate_up is None or down is None:
            return [LinearStruct(), LinearStruct(), LinearStruct()]
        return [
            *self._linears(gate_up, [inner, inner], hidden),
            *self._linears(down, [hidden], inner),
        ]

    def _experts(self, layer: Layer, hidden: int, inner: int) -> tuple[LinearStruct, Any]:
        """The router, and gate, up and down of each expert."""
        experts = layer.experts
        if experts is None:
            return LinearStruct(), None
        pairs = zip(experts.gate_up, experts.down, strict=True)
        parts = [part for pair in pairs for part in self._mlp(*pair, hidden, inner)]
        (router,) = self._linears(experts.router, [experts.count], hidden)
        return router, (LinearStruct * len(parts))(*parts)

    def _at(self, tensor: Tensor | None) -> int | None:
        """Address of a tensor that is kept from now on."""
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linears(self, linear: Linear, sizes: list[int], columns: int) -> list[LinearStruct]:
        """The rows of a fused layer as one layer for each of `sizes`."""
        if isinstance(linear, StackedLinear):
            parts = zip(linear.parts, sizes, strict=True)
            return [self._linears(part, [rows], columns)[0] for part, rows in parts]
        whole = _stored(linear)
        self._weights.append(whole.weight)
        rows = whole.split(sizes)
        self._kept += [t for part in rows for t in part.tensors if t is not None]
        return [part.struct() for part in rows]


def unsupported(weights: DecodeWeights, cache_dtype: torch.dtype) -> str | None:
    """Why this model has no native step here; None: it has one."""
    if weights.final_norm.device.type != "cpu":
        return "it computes on a CPU"
    if cache_dtype != torch.bfloat16:
        return "keys and values must be cached in bf16"
    library = load_library()
    if isinstance(library, str):
        return library
    g = weights.geometry
    if g.hidden % 32 or g.head_dim % 16 or g.turning % 16:
        return "the hidden size must be a multiple of 32, that of a head, and of its part that turns, of 16"
    routers = [layer.experts.router for layer in weights.layers if layer.experts is not None]
    for linear in (*weights.linears, *routers):
        reason = _unsupported_linear(linear)
        if reason is not None:
            return reason
    return None


def _unsupported_linear(linear: Linear) -> str | None:
    if isinstance(linear, StackedLinear):
        ways: dict[int, set[tuple[int, float]]] = {}
        for part in linear.parts:
            if isinstance(part, NativeLinear):
                weight = part.weight
                ways.setdefault(weight.kind, set()).add((weight.rounding, weight.input_scale))
        if any(len(found) > 1 for found in ways.values()):
            return "layers of one format that share an input round it in different ways"
        return next(filter(None, map(_unsupported_linear, linear.parts)), None)
    dense = isinstance(linear, DenseLinear) and linear.activations is None
    if not (dense or isinstance(linear, Int8Linear | NativeLinear)):
        return f"{linear.path} is not among its formats"
    stored = _stored(linear)
    if stored.kind == native.BF16 and stored.weight.dtype != torch.bfloat16:
        return f"a layer has weights in {stored.weight.dtype}"
    if stored.shape[1] % 32:
        return f"a layer has {stored.shape[1]} inputs, no multiple of 32"
    return None


def _rows(linear: Linear) -> int:
    """Outputs of a layer."""
    if isinstance(linear, StackedLinear):
        return sum(map(_rows, linear.parts))
    return _stored(linear).shape[0]


def _stored(linear: Linear) -> NativeWeight:
    if isinstance(linear, DenseLinear):
        return NativeWeight(linear.weight, native.BF16, bias=linear.bias)
    if isinstance(linear, Int8Linear):
        codes = linear.codes.t()
        sums = codes.sum(dim=1, dtype=torch.int32)
        return NativeWeight(
            codes, native.INT8, linear.scale, sums=sums, bias=linear.bias, rounding=native.BY_TOKEN
        )
    assert isinstance(linear, NativeLinear)
    return linear.weight
