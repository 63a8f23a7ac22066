"""The layers of a decoding step on a GPU in one kernel: a new token of each of a few sequences.

Start at `GpuDecoder`: made once from `DecodeWeights`, its `step` launches the kernel of gpu_decode.cu.
`unsupported` says beforehand why a model cannot run so. cuda.py compiles it.

The weights are read where they are, none is copied: [out, in] in bf16, E4M3 or INT8, and INT4 in words, the
layout of skinny.pack_int4.
"""

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinier.errors import TinierError
from tinier.families import Geometry
from tinier.kernels import cuda
from tinier.kernels.layer import DecodeWeights, Layer
from tinier.kernels.linear import Fp8Linear, Linear, RoundingLinear
from tinier.kernels.machine import machine_of
from tinier.kernels.reference import Cache
from tinier.kernels.skinny import Weight

MOST_TOKENS = 4
SOURCE = Path(__file__).with_name("gpu_decode.cu")

BF16, E4M3, INT8 = range(3)
_INT4 = {128: 3, 64: 4, 32: 5}  # by group size
_CACHES = {torch.bfloat16: BF16, torch.float8_e4m3fn: E4M3, torch.int8: INT8}
_THREADS, _WARPS, _TILE = 512, 15, 8
_UNITS, _INT4_UNITS = 29, 27  # of 64 bytes of a row, that are copied together
_STAGE = 16384
_MOST_SPLITS = 16
_LARGEST_LAYER = 210_000_000  # bytes; 3B's in bf16 has 201 million
_LOG2_E = 1.4426950408889634


class _Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "bias", "maps")),
        *((name, c_int32) for name in ("rows", "columns", "kind")),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in (
            "input_norm", "post_norm", "q_norm", "k_norm", "keys", "values", "k_scale", "v_scale",
        )),
    )  # fmt: skip


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (
            "layers", "cos", "sin", "entering", "leaving", "stream", "qkv", "attended", "act", "partial",
            "sums", "positions", "slots", "contexts", "tables", "counters",
        )),
        *((name, c_int32) for name in ("width", "splits", "stages", "x_stride", "x_bytes")),
        *((name, c_float) for name in ("eps", "scale")),
    )  # fmt: skip


class GpuDecoder:
    """A decoder and its cache, ready for `step`. It reads the tensors that it was made from in place."""

    def __init__(
        self,
        weights: DecodeWeights,
        caches: Sequence[Cache],
        rotation: tuple[Tensor, Tensor],
        block_size: int,
        most_tokens: int,
    ) -> None:
        """rotation: cos and sin of every position, each [positions, R], bf16. block_size: slots in one
        cache block. most_tokens: of a step, MOST_TOKENS or fewer. Raises TinierError where `unsupported`
        says why."""
        reason = unsupported(weights, caches, rotation)
        if reason is not None:
            raise TinierError(f"no decoding step in one kernel: {reason}")
        g, device = weights.geometry, weights.final_norm.device
        self._device, self._rotation = device, rotation
        self._maps: list[Tensor] = []
        layers = [self._layer(*parts) for parts in zip(weights.layers, caches, strict=True)]
        self._layers = _on(device, bytes((_Layer * len(layers))(*layers)))
        self._weights, self._caches = weights, caches  # the structs point into them
        self._sizes = {
            "HIDDEN": g.hidden, "INNER": g.intermediate, "HEADS": g.heads, "KV_HEADS": g.kv_heads,
            "HEAD_DIM": g.head_dim, "TURNING": g.turning, "BLOCK_SIZE": block_size, "LAYERS": g.layers,
            "CACHE": _CACHES[caches[0].keys.dtype], "HEAD_NORMS": int(g.head_norms != "none"),
            "STEP_BYTES": ctypes.sizeof(_Step), "TOTALS": _totals_bytes(g),
            "KINDS": sum({1 << kind for kind in map(_kind, _linears(weights)) if kind is not None}),
        }  # fmt: skip
        self._kernels: dict[int, tuple[cuda.Kernel, _Memory]] = {}
        self._blocks = _blocks(weights)
        self.most_tokens, width = most_tokens, (g.heads + 2 * g.kv_heads) * g.head_dim
        self._counters = torch.tensor([1, 0], dtype=torch.int32, device=device)
        self._words = {
            name: torch.zeros(most_tokens * size, dtype=torch.int64, device=device)
            for name, size in (
                ("stream", g.hidden // 2),
                ("qkv", width // 2),
                ("attended", g.heads * g.head_dim // 2),
                ("act", g.intermediate // 2),
                ("partial", _MOST_SPLITS * g.heads * g.head_dim),
                ("sums", _MOST_SPLITS * g.heads),
            )
        }

    def step(
        self, entering: Tensor, positions: Tensor, slots: Tensor, contexts: Tensor, tables: Tensor
    ) -> Tensor:
        """What leaves the last layer [S, hidden] in bf16, before the final norm, of a new token of each of
        S sequences, whose keys and values are written to the cache. S: most_tokens at most.

        entering: [S, hidden] in bf16, what enters the first layer. The others int32. positions, slots,
        contexts: [S]. tables: [S, width] cache blocks.
        """
        g, tokens = self._weights.geometry, entering.shape[0]
        assert tokens <= self.most_tokens
        inputs = {
            "entering": entering, "positions": positions, "slots": slots, "contexts": contexts,
            "tables": tables,
        }  # fmt: skip
        assert all(t.is_contiguous() for t in inputs.values())
        leaving = torch.empty_like(entering)
        if tokens not in self._kernels:
            shared = _shared_bytes(g, tokens, self._caches[0].keys.itemsize)
            sizes = {**self._sizes, "TOKENS": tokens, "SHARED_BYTES": shared}
            self._kernels[tokens] = (
                cuda.load(SOURCE, sizes, "decode_step", self._device),
                _memory_of(self._weights, self._caches, tokens),
            )
        kernel, memory = self._kernels[tokens]
        named = {"leaving": leaving, "counters": self._counters, "layers": self._layers}
        pointers = {name: t.data_ptr() for name, t in {**inputs, **self._words, **named}.items()}
        step = _Step(
            **pointers, cos=self._rotation[0].data_ptr(), sin=self._rotation[1].data_ptr(),
            width=tables.shape[1],
            splits=max(1, min(_MOST_SPLITS, self._blocks // (tokens * g.kv_heads))),
            stages=memory.stages, x_stride=memory.x_stride, x_bytes=memory.x_bytes,
            eps=g.norm_eps, scale=(g.multipliers.attention or g.head_dim**-0.5) * _LOG2_E,
        )  # fmt: skip
        kernel.launch(step, self._blocks, _THREADS, memory.whole)
        return leaving

    def _layer(self, layer: Layer, cache: Cache) -> _Layer:
        assert layer.gate_up is not None
        assert layer.down is not None
        linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
        norms = (layer.input_norm, layer.post_norm, *(layer.head_norms or (None, None)))
        tensors = (*norms, cache.keys, cache.values, *(cache.scales or (None, None)))
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        return _Layer(*map(self._linear, linears), *pointers)

    def _linear(self, linear: Linear) -> _Linear:
        weight, kind = linear.few, _kind(linear)
        assert weight is not None
        assert kind is not None
        maps = _maps(weight)
        self._maps.append(maps)
        tensors = (weight.codes, weight.scale, weight.bias, maps)
        assert all(t is None or t.is_contiguous() for t in tensors)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        return _Linear(*pointers, *weight.shape, kind)


class _Memory(NamedTuple):
    """How a block's shared memory is used."""

    whole: int
    x_stride: int
    """Bytes of a token's input"""
    x_bytes: int
    """Of all tokens' inputs with their sums, and of what attention needs"""
    stages: int
    """Of the ring, in what is left"""


def _memory_of(weights: DecodeWeights, caches: Sequence[Cache], tokens: int) -> _Memory:
    g = weights.geometry
    shared = _up(_shared_bytes(g, tokens, caches[0].keys.itemsize))
    x_stride = max(map(_token_bytes, _linears(weights))) + 64
    x_bytes = _up(max(tokens * (x_stride + _totals_bytes(g)), _attention_bytes(g)))
    whole = cuda.most_shared_memory(weights.final_norm.device)
    left = whole - shared - x_bytes - 256
    return _Memory(whole, x_stride, x_bytes, left // (_STAGE + 16))


def _linears(weights: DecodeWeights) -> list[Linear]:
    """Those that the kernel multiplies: all but the head."""
    return weights.linears[:-1]


def _blocks(weights: DecodeWeights) -> int:
    """How many run: as many as have rows of every layer."""
    tiles = [
        linear.few.shape[0] // _TILE // (1 + (linear is layer.gate_up))
        for layer in weights.layers
        for linear in layer.linears
        if linear.few is not None
    ]
    return min([_multiprocessors(weights.final_norm.device), *tiles])


def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _slots(tokens: int) -> int:
    """Tiles of rows between two summations."""
    return 16 if tokens <= 2 else 8


def _up(count: int) -> int:
    return -(-count // 128) * 128


def _totals_bytes(g: Geometry) -> int:
    """Of a token's sums of 32 columns each."""
    return _up(max(g.hidden, g.intermediate, g.heads * g.head_dim)) // 8


def _shared_bytes(g: Geometry, tokens: int, cache_bytes: int) -> int:
    """Of struct Shared. cache_bytes: of a number in the cache."""
    slots = _slots(tokens)
    turn = 2 * _WARPS
    keys = _STAGE // (2 * g.head_dim * cache_bytes * turn) * turn
    of_token = slots * _WARPS * _TILE + 2 * _WARPS + 3 + g.turning
    words = of_token * tokens + slots * _TILE + 6 + keys
    return ctypes.sizeof(_Step) + -(-words // 2) * 8 + ctypes.sizeof(_Layer) * g.layers


def _attention_bytes(g: Geometry) -> int:
    """Shared memory of a part of the attention."""
    group = g.heads // g.kv_heads
    numbers = (group + 2) * g.head_dim + _WARPS * group * (g.head_dim + 2) + group
    return 4 * numbers


def _token_bytes(linear: Linear) -> int:
    """What a token takes in shared memory as the layer's input, in whole rows of 128 bytes."""
    weight = linear.few
    assert weight is not None
    columns = weight.shape[1]
    return _up(columns if _kind(linear) == INT8 else 2 * _up(columns))


def faster_up_to(weights: DecodeWeights) -> int:
    """Tokens of a step up to which the kernel is used where nobody asks for it; 0: never.

    Measured on an H100 with Llama-3.2-3B's shape at 450 tokens of context (benchmarks/decode_kernel.py), in
    bf16, FP8, INT8 and INT4 in groups of 128, and in bf16 with Llama-3.2-1B's and Qwen3-0.6B's; in the
    engine with SmolLM2-135M (docs/log.md). The last two have rows for 128 and 72 of its 132
    multiprocessors. Taken to hold for INT4's other groups with one token and for other layers that are
    smaller: what the kernel saves is a layer's fixed cost.
    """
    device = weights.final_norm.device
    layer = sum(linear.num_bytes for linear in weights.layers[0].linears)
    if machine_of(device).capability != (9, 0) or layer > _LARGEST_LAYER:
        return 0
    kind, *others = set(map(_kind, _linears(weights)))
    if _blocks(weights) < _multiprocessors(device) and kind != BF16:
        return 0
    known = {BF16: 1, E4M3: 1, INT8: 1, **dict.fromkeys(_INT4.values(), 1), _INT4[128]: 2}
    # a second kind costs registers
    return 0 if others or kind is None else known.get(kind, 0)


def unsupported(
    weights: DecodeWeights, caches: Sequence[Cache], rotation: tuple[Tensor, Tensor]
) -> str | None:
    """Why this model has no such step here; None: it has one."""
    device = weights.final_norm.device
    if machine_of(device).capability < (9, 0):
        return "it needs a GPU of compute capability 9.0 or later"
    g, m = weights.geometry, weights.geometry.multipliers
    group = g.heads // g.kv_heads
    ropes = {kind.rope for kind in g.kinds}
    norms = [
        norm
        for layer in weights.layers
        for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        if norm is not None
    ]
    for reason, holds in (
        ("it has experts", g.mixture is not None),
        ("its activation is not SiLU", g.activation != "silu"),
        ("it has windows, or layers that turn in different ways or not at all",
         any(g.windows) or len(ropes) > 1 or None in ropes),
        ("it multiplies what its blocks add, or its logits", m.residual != 1 or m.logits != 1),
        ("its norms are not before its blocks alone, or over all heads", any(
            layer.input_norm is None or layer.post_norm is None or layer.attention_out_norm is not None
            or layer.mlp_out_norm is not None or layer.norms_all_heads for layer in weights.layers
        )),
        ("norms or RoPE are not in bf16",
         any(t.dtype != torch.bfloat16 for t in (*norms, *rotation))),
        ("its heads have other sizes than 64 or 128", g.head_dim not in (64, 128)),
        ("more than four query heads share a KV head", group > 4),
        ("its sizes are not multiples of 16", bool(g.hidden % 16 or g.intermediate % 16)),
        ("its cache is in another format", any(c.keys.dtype not in _CACHES for c in caches)),
    ):  # fmt: skip
        if holds:
            return reason
    found = next(filter(None, map(_unsupported_linear, _linears(weights))), None)
    if found is None and g.hidden > _blocks(weights) * _TILE * _slots(MOST_TOKENS):
        found = "it is too wide for this GPU's multiprocessors"
    if found is None and _memory_of(weights, caches, MOST_TOKENS).stages < 2:
        found = "it is too wide for this GPU's shared memory"
    return found or cuda.missing()


def _unsupported_linear(linear: Linear) -> str | None:
    weight, kind = linear.few, _kind(linear)
    if weight is None or kind is None:
        return f"{linear.path} is not among its formats"
    rows, columns = weight.shape
    unit = 8 if weight.group_size else 32 if kind == BF16 else 64
    if rows % _TILE or columns % unit:
        return f"a layer has {rows} outputs and {columns} inputs, no multiples of 8 and {unit}"
    return None


def _kind(linear: Linear) -> int | None:
    """How the kernel multiplies a layer; None: it cannot."""
    weight = linear.few
    if weight is None or (isinstance(linear, Fp8Linear) and linear.input_scale is not None):
        return None
    if isinstance(linear, RoundingLinear) and linear.activations is not None:
        return None  # its inputs are rounded to another grid first
    if weight.group_size:
        return _INT4.get(weight.group_size)
    if weight.codes.dtype == torch.bfloat16:
        return BF16
    kinds = {("e4m3", torch.float8_e4m3fn): E4M3, ("int8", torch.int8): INT8}
    return kinds.get((linear.takes or "", weight.codes.dtype))


def _maps(weight: Weight) -> Tensor:
    """Tensor maps of a weight, and of INT4's scales: boxes of 8 rows, and of as many units of 64 bytes of a
    row as are copied together (struct Cut)."""
    rows, columns = weight.shape
    if weight.group_size:
        assert weight.scale is not None
        blocks, units = weight.codes.shape[:2]
        most = _most_units(units, _INT4_UNITS)
        # of 64 rows of a unit, 64 bytes each, in elements of 8 bytes
        maps = cuda.tensor_map(weight.codes, 8, (512, blocks * units), (64, most))
        box = (_TILE, most * (128 // weight.group_size))
        maps += cuda.tensor_map(weight.scale, 2, (rows, len(weight.scale)), box)
    else:
        elements = columns * weight.codes.element_size() // 8
        most = _most_units(elements // 8, _UNITS)
        maps = cuda.tensor_map(weight.codes, 8, (elements, rows), (most * 8, _TILE))
    return _on(weight.codes.device, maps)


def _on(device: torch.device, data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _most_units(units: int, room: int) -> int:
    """Of a piece, as struct Cut has it."""
    pieces = -(-units // room)
    return -(-units // pieces) | 1
