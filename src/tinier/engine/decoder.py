"""The decoder: token ids in, hidden states and logits out. Written for speed, not for training.

Start at `load_decoder`, then `Decoder.forward`. q, k, v and gate, up are stored fused. Attention is
a function that the caller passes in, so that the same layers serve the paged engine (runner.py) and
the evaluation of whole windows (`causal_windows`).

T: tokens of all sequences, packed one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.checkpoint import Checkpoint, TensorReader, unpack_linear
from tinier.device import bf16_products, check_memory
from tinier.engine.parallel import ALONE, Share
from tinier.engine.rope import Rope
from tinier.errors import InputError
from tinier.families import (
    EMBEDDING_MODULE,
    FINAL_NORM,
    HEAD_LINEAR,
    Geometry,
    Input,
    Update,
    checkpoint_layout,
    geometry_of,
    layer_name,
    norm_weight,
    read_adapter,
    resolved_config,
    rope_keys,
)
from tinier.kernels import (
    Experts,
    HeadInputs,
    Layer,
    Linear,
    StoredLinear,
    Table,
    add_rms_norm,
    embed,
    gated,
    joined,
    make_experts,
    make_linear,
    make_table,
    norm_all_heads,
    reference,
    rms_norm,
    table_of,
)
from tinier.kernels.adapted import AdaptedLinear, Chosen
from tinier.kernels.reference import encode, split_heads
from tinier.numerics import Quantized
from tinier.schemes import Int4Inputs, Layout

Rotations = dict[str | None, tuple[Tensor, Tensor]]
"""By LayerKind.rope: cos and sin, each [T, R] for the R channels of a head that turn"""
Attention = Callable[[int, Tensor], Tensor | Quantized]
"""(layer, fused q, k, v [T, (heads + 2·kv_heads)·head_dim] or their parts) -> [T, heads·head_dim], codes if
the layer's `out` takes them"""


class Decoder:
    """A loaded model. Make one with `load_decoder`."""

    def __init__(
        self,
        geometry: Geometry,
        embedding: Table,
        layers: Sequence[Layer],
        final_norm: Tensor,
        head: Linear,
        ropes: dict[str, Rope],
        layout: Layout | None,
        share: Share = ALONE,
        chosen: Chosen | None = None,
    ) -> None:
        """geometry: of this process's share. ropes: by LayerKind.rope. chosen: of its adapters; None: there
        are none."""
        self.geometry = geometry
        self.share = share
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self.layout = layout
        self.chosen = chosen or Chosen(0)
        self._ropes = ropes

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def _head_is_shared(self) -> bool:
        return _shares_head(self.geometry, self.share)

    @property
    def cache_dtype(self) -> torch.dtype:
        """What one number of the KV cache is stored in."""
        grid = self.layout.kv_cache if self.layout else None
        if grid is None:
            return self.dtype
        return torch.int8 if grid.kind == "int" else torch.float8_e4m3fn

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take in memory as loaded; a head that reads the embedding counts once."""
        linears = sum(linear.num_bytes for layer in self.layers for linear in layer.linears)
        head = table_of(self.head, self.dtype)
        embedding = self.embedding.codes.untyped_storage().data_ptr()
        shared = head is not None and head.codes.untyped_storage().data_ptr() == embedding
        return linears + self.embedding.num_bytes + (0 if shared else self.head.num_bytes)

    @property
    def paths(self) -> dict[str, bool]:
        """How the linear layers are multiplied, each with whether the device does so natively."""
        linears = [linear for layer in self.layers for linear in layer.linears] + [self.head]
        return {linear.path: linear.fast for linear in linears}

    @torch.inference_mode()
    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        """Hidden states after the final norm. x: embeddings of the tokens. Both [T, hidden]."""
        delta: Tensor | None = None
        for index in range(self.geometry.layers):
            x, delta = self.layer(index, x, delta, attend)
        return self.normed(x, delta)

    def normed(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, of what leaves the last layer [T, hidden]: see `layer`."""
        _, y = self._add_norm(x, delta, self.final_norm, between=self.layers[-1].mlp_out_norm)
        assert isinstance(y, Tensor)
        return y

    @torch.inference_mode()
    def layer(
        self, index: int, x: Tensor, delta: Tensor | None, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer over the hidden states that x and delta [T, hidden] stand for (`summed`);
        returns such a pair.

        What a block adds is left apart, in parts and on its process, so that adding it is part of the norm
        that reads the sum.
        """
        layer = self.layers[index]
        with bf16_products(self.device):
            before = self.layers[index - 1].mlp_out_norm if index else None
            x, y = self._add_norm(x, delta, layer.input_norm, layer.qkv.takes, between=before)
            qkv = layer.qkv(y)
            if layer.norms_all_heads:
                qkv = self._norm_all_heads(layer, qkv)
            delta = layer.out(attend(index, qkv))
            takes = layer.gate_up.takes if layer.gate_up else None
            x, y = self._add_norm(
                x, delta, layer.post_norm, takes, layer.attention_out_norm, turn=1
            )
            return x, self._mlp(layer, y)

    def _mlp(self, layer: Layer, y: Tensor | Quantized) -> Tensor:
        if layer.experts is not None:
            assert isinstance(y, Tensor)
            return layer.experts(y)
        assert layer.gate_up is not None
        assert layer.down is not None
        act = gated(layer.gate_up(y), self.dtype, layer.down.takes, self.geometry.activation)
        return layer.down(act)

    def _add_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor | None, takes: str | None = None,
        between: Tensor | None = None, turn: int = 0,
    ) -> tuple[Tensor, Tensor | Quantized]:  # fmt: skip
        """x + delta, which is summed over all processes first and goes through the norm `between`, and the
        norm of the sum; weight None: the sum itself."""
        peers, eps = self.share.peers, self.geometry.norm_eps
        times = self.geometry.multipliers.residual
        if delta is None or self.share.size == 1:
            return add_rms_norm(x, delta, weight, eps, takes, times, between)
        if peers is not None and peers.fits_sum(*x.shape):
            return add_rms_norm(x, delta, weight, eps, takes, times, between, peers, turn)
        delta = self.share.sum(joined(delta, self.dtype))
        return add_rms_norm(x, delta, weight, eps, takes, times, between)

    def _norm_all_heads(self, layer: Layer, qkv: Tensor) -> Tensor:
        """q and k normed over the heads of all processes."""
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        norms, eps = (layer.q_norm, layer.k_norm), self.geometry.norm_eps
        if self.share.size == 1:
            return norm_all_heads(qkv, norms, eps, self.dtype)
        qkv = joined(qkv, self.dtype)
        sizes = [len(norm) for norm in norms]
        parts = qkv.float().split([*sizes, sizes[1]], dim=-1)
        means = [part.square().mean(dim=-1) / self.share.size for part in parts[:2]]
        return reference.norm_all_heads(qkv, norms, eps, self.share.sum(torch.stack(means, dim=-1)))

    def head_inputs(self, index: int, rotations: Rotations) -> HeadInputs:
        """What q and k of a layer go through."""
        g = self.geometry
        rotation = rotations[g.kinds[index].rope]
        norms, scale = self.layers[index].head_norms, g.multipliers.attention
        return HeadInputs(rotation, g.heads, self.dtype, norms, g.norm_eps, scale)

    def rotations(self, positions: Tensor, longest: int) -> Rotations:
        """For positions [T] of sequences of up to `longest` tokens, in the computing type, or in float32
        where the family multiplies so. Layers without RoPE turn by nothing: cos 1, sin 0."""
        dtype = torch.float32 if self.geometry.rope_in_float32 else self.dtype
        found: Rotations = {
            key: rope(positions, longest, dtype) for key, rope in self._ropes.items()
        }
        if any(kind.rope is None for kind in self.geometry.kinds):
            cos, sin = next(iter(found.values()))
            found[None] = torch.ones_like(cos), torch.zeros_like(sin)
        return found

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden]. Returns [..., vocab] in the computing type."""
        with bf16_products(self.device):
            flat = joined(self.head(hidden.reshape(-1, hidden.shape[-1])), self.dtype)
        if self._head_is_shared:
            flat = self.share.side_by_side(flat)
        return self._divided(flat).reshape(*hidden.shape[:-1], -1)

    def _divided(self, logits: Tensor) -> Tensor:
        divisor = self.geometry.multipliers.logits
        return logits if divisor == 1 else logits / divisor

    def embed(self, tokens: Tensor, sampled: Tensor | None = None) -> Tensor:
        """What enters the first layer, [T, hidden], for tokens [T]; token -1 - i stands for sampled[i]."""
        if sampled is None:
            sampled = torch.zeros(1, dtype=torch.int64, device=self.device)  # none is asked for
        return embed(tokens, sampled, self.embedding, self.geometry.multipliers.embedding)

    def summed(self, index: int, x: Tensor, delta: Tensor) -> Tensor:
        """The hidden states that `layer` returned as a pair, on one process."""
        delta, norm = joined(delta, self.dtype), self.layers[index].mlp_out_norm
        if norm is not None:
            delta = rms_norm(delta, norm, self.geometry.norm_eps)
        return x + delta * self.geometry.multipliers.residual

    @torch.inference_mode()
    def logits_float32(self, hidden: Tensor) -> Tensor:
        """The same for [T, hidden], multiplied out in float32 and not rounded: for measuring."""
        flat = self.head.float32(hidden)
        return self._divided(self.share.side_by_side(flat) if self._head_is_shared else flat)

    def hidden_states(self, windows: Tensor) -> Tensor:
        """Causal forward of whole windows. windows: [batch, length]. Returns [batch, length, hidden].

        Raises InputError where a layer's output is no number.
        """
        batch, length = windows.shape
        attend = causal_windows(self, batch, length)
        tokens = windows.to(self.device).reshape(-1)
        flat = self.forward(self.embed(tokens), attend)
        if not torch.isfinite(flat).all():
            raise InputError(self.overflow(windows))
        return flat.view(batch, length, -1)

    @torch.inference_mode()
    def overflow(self, windows: Tensor) -> str:
        """Where windows [batch, length] of token ids stop being numbers, for people."""
        batch, length = windows.shape
        attend = causal_windows(self, batch, length)
        x, delta = self.embed(windows.to(self.device).reshape(-1)), None
        name = str(self.dtype).removeprefix("torch.")
        advice = (
            f"{name} is too narrow for this model: set dtype to bfloat16 or float32 in its config.json."
            if self.dtype == torch.float16
            else "Its weights are damaged, or scaled wrongly."
        )
        for index in range(self.geometry.layers):
            x, delta = self.layer(index, x, delta, attend)
            fine = torch.isfinite(x).all() and torch.isfinite(joined(delta, self.dtype)).all()
            if not self.share.least(int(fine)):
                where = f"the hidden states after {layer_name(index)} are no numbers (NaN or Inf)"
                return f"{where}, in {name}. {advice}"
        return f"the hidden states after the final norm are no numbers, in {name}. {advice}"


def causal_windows(decoder: Decoder, batch: int, length: int) -> Attention:
    """Attention over `batch` sequences of `length` tokens, with nothing cached."""
    g = decoder.geometry
    positions = torch.arange(length, device=decoder.device).repeat(batch)
    rotations = {
        rope: (cos.unsqueeze(1), sin.unsqueeze(1))
        for rope, (cos, sin) in decoder.rotations(positions, length).items()
    }
    dtype = decoder.cache_dtype

    def attend(index: int, qkv: Tensor) -> Tensor:
        layer = decoder.layers[index]
        qkv = joined(qkv, decoder.dtype)
        rotation = rotations[g.kinds[index].rope]
        q, k, v = split_heads(qkv, rotation, layer.head_norms, g.norm_eps, g.heads, g.kv_heads)
        if layer.kv_scales is not None:
            k, v = (
                (encode(t, scale, dtype).float() * scale.float()).to(qkv.dtype)
                for t, scale in zip((k, v), layer.kv_scales, strict=True)
            )
        window = g.kinds[index].window
        mask = None
        if window is not None and length > window:
            at = torch.arange(length, device=q.device)
            mask = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - window)
        # [batch, heads, length, head_dim]
        q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True,
            scale=g.multipliers.attention,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1).flatten(1)

    return attend


def load_decoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None = None,
    share: Share = ALONE, int4_inputs: Int4Inputs = "16bit", on_demand: bool = False,
    adapters: Sequence[Path] = (),
) -> Decoder:  # fmt: skip
    """Read a verified checkpoint onto `device`, or this process's share of it.

    dtype: what to compute in; None: the checkpoint's. int4_inputs: EngineConfig's. on_demand: each layer is
    read when its turn comes, two are in memory. adapters: folders of LoRA adapters, which `Decoder.chosen`
    chooses from. Raises CheckpointError for a quantization that the engine cannot run or an adapter of
    another model, InputError where the model cannot be shared so.
    """
    whole = geometry_of(checkpoint)
    geometry = share.geometry(whole)
    layout = checkpoint_layout(checkpoint)
    dtype = dtype or checkpoint.dtype
    needed = checkpoint.typed_bytes // share.size
    check_memory(
        needed // geometry.layers if on_demand else needed, device, f"loading {checkpoint.folder.name}",
        "Use a smaller variant, or another --device.",
    )  # fmt: skip
    beside = [read_adapter(folder, checkpoint) for folder in adapters]
    chosen = Chosen(len(beside))
    with checkpoint.reader(device) as read:
        weights = _Weights(
            checkpoint, read, layout, dtype, share, whole, int4_inputs, beside, chosen, device
        )
        layers: Sequence[Layer]
        if on_demand:
            layers = _LayersOnDemand(weights, geometry.layers, device)
        else:
            layers = [weights.layer(layer_name(i)) for i in range(geometry.layers)]
        final_norm = norm_weight(read(FINAL_NORM).to(dtype), geometry)
        embedding, head = weights.ends(_shares_head(geometry, share))
    config = resolved_config(checkpoint)
    ropes = {key: Rope(config, device, key) for key in rope_keys(config)}
    return Decoder(geometry, embedding, layers, final_norm, head, ropes, layout, share, chosen)


class _LayersOnDemand(Sequence[Layer]):
    """Layers that are read when they are asked for; the last two stay."""

    def __init__(self, weights: "_Weights", count: int, device: torch.device) -> None:
        self._weights, self._count, self._device = weights, count, device
        self._kept: dict[int, Layer] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Layer:  # type: ignore[override]
        index = range(self._count)[index]
        if index not in self._kept:
            if len(self._kept) == 2:
                del self._kept[next(iter(self._kept))]  # the one that was read first
            # a reader for each layer: an open file keeps what was read from it in memory
            with self._weights.checkpoint.reader(self._device) as read:
                self._kept[index] = replace(self._weights, read=read).layer(layer_name(index))
        return self._kept[index]


@dataclass(frozen=True, slots=True)
class _Weights:
    """Reads the layers of a checkpoint as one process's share of them."""

    checkpoint: Checkpoint
    read: TensorReader
    layout: Layout | None
    dtype: torch.dtype
    share: Share
    whole: Geometry
    """Of the model, not of the share"""
    int4_inputs: Int4Inputs
    adapters: list[dict[str, Update]]
    """By the weight's name"""
    chosen: Chosen
    device: torch.device

    def layer(self, name: str) -> Layer:
        geometry = self.whole
        names, attention = geometry.norm_names, f"{name}.self_attn"
        (qkv, out), *mlps = geometry.blocks
        gate_up, down = mlps[0]
        is_mlp = geometry.mixture is None
        return Layer(
            input_norm=self._norm(name, names.attention_in),
            qkv=self._reading(name, qkv),
            q_norm=self._head_norm(attention, "q_norm"),
            k_norm=self._head_norm(attention, "k_norm"),
            norms_all_heads=geometry.head_norms == "all",
            out=self._writing(name, out),
            post_norm=self._norm(name, names.mlp_in),
            gate_up=self._reading(name, gate_up) if is_mlp else None,
            down=self._writing(name, down) if is_mlp else None,
            experts=None if is_mlp else self._experts(name, mlps),
            attention_out_norm=self._norm(name, names.attention_out),
            mlp_out_norm=self._norm(name, names.mlp_out),
            kv_scales=self._kv_scales(attention),
        )

    def ends(self, shares_head: bool) -> tuple[Table, Linear]:
        """Embedding and head, one in memory where they are tied. shares_head: by rows."""
        embedding, tied = self.stored(EMBEDDING_MODULE), self.whole.tied_head
        if tied:
            scheme = self.layout.schemes.get(HEAD_LINEAR) if self.layout else None
            last = embedding._replace(scheme=scheme)
        else:
            last = self.stored(HEAD_LINEAR)
        head = self._linear([self.share.rows(last) if shares_head else last])
        table = table_of(head, self.dtype) if tied and not shares_head else None
        return make_table(embedding, self.dtype) if table is None else table, head

    def stored(self, name: str) -> StoredLinear:
        """One linear layer as the checkpoint has it, or the embedding, on the reader's device."""
        find = self.checkpoint.optional(self.read)
        bias = find(f"{name}.bias")
        bias = None if bias is None else bias.to(self.dtype)
        scheme = self.layout.schemes.get(name) if self.layout else None
        if scheme is None:
            return StoredLinear(self.read(f"{name}.weight"), bias)
        assert self.layout is not None
        weight, input_scale = unpack_linear(find, name, scheme, self.layout.storage)
        return StoredLinear(weight, bias, scheme, input_scale)

    def _linear(self, parts: list[StoredLinear]) -> Linear:
        return make_linear(parts, self.dtype, self.int4_inputs)

    def _reading(self, layer: str, block: Input) -> Linear:
        """The linear layers that read one input."""
        return self._adapted(self._linear(self._rows(layer, block)), layer, block)

    def _writing(self, layer: str, block: Input) -> Linear:
        """The linear layer that writes to the stream."""
        return self._adapted(self._linear([self._columns(layer, block)]), layer, block)

    def _adapted(self, linear: Linear, layer: str, block: Input) -> Linear:
        """With what adapters add to its rows."""
        parts, first = [], 0
        for name in block.readers:
            for number, adapter in enumerate(self.adapters, 1):
                update = adapter.get(f"{layer}.{name}.weight")
                parts += [] if update is None else [(number, first, update)]
            first += sum(rows for _, rows in self.whole.outputs[name])
        if not parts:
            return linear
        return AdaptedLinear(linear, parts, first, self.chosen, self.dtype, self.device)

    def _rows(self, layer: str, block: Input) -> list[StoredLinear]:
        """This process's outputs of the linear layers that read one input."""
        outputs = self.whole.outputs
        return [
            self.share.rows(self.stored(f"{layer}.{name}"), [n for _, n in outputs[name]])
            for name in block.readers
        ]

    def _columns(self, layer: str, block: Input) -> StoredLinear:
        """A linear layer over this process's inputs."""
        (name,) = block.readers
        return self.share.columns(self.stored(f"{layer}.{name}"))

    def _experts(self, layer: str, blocks: list[tuple[Input, Input]]) -> Experts:
        geometry = self.whole
        assert geometry.mixture is not None
        return make_experts(
            self.read(f"{layer}.{geometry.router}.weight").to(self.dtype),
            [(self._rows(layer, first), self._columns(layer, last)) for first, last in blocks],
            self.dtype,
            top_k=geometry.top_k,
            sums_to_one=geometry.shares_sum_to_one,
            in_float32=geometry.mixture.in_float32,
            activation=geometry.activation,
            int4_inputs=self.int4_inputs,
        )

    def _norm(self, layer: str, name: str | None) -> Tensor | None:
        if name is None:
            return None
        stored = self.read(f"{layer}.{name}.weight").to(self.dtype)
        return norm_weight(stored, self.whole)

    def _head_norm(self, attention: str, name: str) -> Tensor | None:
        kind = self.whole.head_norms
        weight = self._norm(attention, None if kind == "none" else name)
        return self.share.part(weight) if weight is not None and kind == "all" else weight

    def _kv_scales(self, attention: str) -> tuple[Tensor, Tensor] | None:
        if self.layout is None or self.layout.kv_cache is None:
            return None
        keys, values = (self.read(f"{attention}.{name}_scale").float().reshape(1) for name in "kv")
        return keys, values


def _shares_head(geometry: Geometry, share: Share) -> bool:
    """Whether the head is cut by rows: where the vocabulary divides."""
    return share.size > 1 and geometry.vocab % share.size == 0
