"""The decoder: token ids in, hidden states and logits out. Written for speed, not for training.

Start at `load_decoder`, then `Decoder.forward`. q, k, v and gate, up are stored fused. Attention is
a function that the caller passes in, so that the same layers serve the paged engine (runner.py) and
the evaluation of whole windows (`causal_windows`).

T: tokens of all sequences, packed one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinier.checkpoint import Checkpoint, scheme_of
from tinier.checkpoint.folder import TensorReader
from tinier.families import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Geometry,
    geometry_of,
    hf_config,
    layer_name,
)
from tinier.kernels import Linear, StoredLinear, make_linear, rms_norm, rotate, silu_mul
from tinier.schemes import Scheme

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, head_dim], k and v [T, kv_heads, head_dim]) -> [T, heads, head_dim]"""


@dataclass(slots=True, kw_only=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)


class Decoder:
    """A loaded model. Make one with `load_decoder`."""

    def __init__(
        self,
        geometry: Geometry,
        embedding: Tensor,
        layers: list[Layer],
        final_norm: Tensor,
        head: Tensor,
        rope: LlamaRotaryEmbedding,
    ) -> None:
        self.geometry = geometry
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self._rope = rope

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take in memory as loaded; a tied head counts once."""
        tensors = {self.embedding.data_ptr(): self.embedding, self.head.data_ptr(): self.head}
        linears = sum(linear.num_bytes for layer in self.layers for linear in layer.linears)
        return linears + sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def paths(self) -> dict[str, bool]:
        """How the linear layers are multiplied, each with whether the device does so natively."""
        return {linear.path: linear.fast for layer in self.layers for linear in layer.linears}

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Hidden states after the final norm. tokens, positions: [T]. Returns [T, hidden]."""
        g = self.geometry
        sizes = [g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.head_dim]
        x = F.embedding(tokens, self.embedding)  # [T, hidden]
        cos, sin = self._rope(x, positions.unsqueeze(0))
        cos, sin = cos.squeeze(0).unsqueeze(1), sin.squeeze(0).unsqueeze(1)  # [T, 1, head_dim]
        for i, layer in enumerate(self.layers):
            y = rms_norm(x, layer.input_norm, g.norm_eps)
            q, k, v = layer.qkv(y).split(sizes, dim=-1)
            q = q.unflatten(-1, (g.heads, g.head_dim))  # [T, heads, head_dim]
            k = k.unflatten(-1, (g.kv_heads, g.head_dim))  # [T, kv_heads, head_dim]
            v = v.unflatten(-1, (g.kv_heads, g.head_dim))
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rms_norm(q, layer.q_norm, g.norm_eps)
                k = rms_norm(k, layer.k_norm, g.norm_eps)
            attended = attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + layer.out(attended.flatten(1))
            y = rms_norm(x, layer.post_norm, g.norm_eps)
            x = x + layer.down(silu_mul(layer.gate_up(y)))
        return rms_norm(x, self.final_norm, g.norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden]. Returns [..., vocab] in the computing type."""
        return F.linear(hidden, self.head)

    def hidden_states(self, windows: Tensor) -> Tensor:
        """Causal forward of whole windows. windows: [batch, length]. Returns [batch, length, hidden]."""
        batch, length = windows.shape
        positions = torch.arange(length, device=self.device).repeat(batch)
        attend = causal_windows(batch, self.geometry)
        flat = self.forward(windows.to(self.device).reshape(-1), positions, attend)
        return flat.view(batch, length, -1)


def causal_windows(batch: int, geometry: Geometry) -> Attention:
    """Attention over `batch` sequences of equal length, with nothing cached."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[0] // batch
        window = geometry.windows[layer]
        mask = None
        if window is not None and length > window:
            at = torch.arange(length, device=q.device)
            mask = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - window)
        # [batch, heads, length, head_dim]
        q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def load_decoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None = None
) -> Decoder:
    """Read a verified checkpoint onto `device`. dtype: what to compute in; None: the checkpoint's.

    Raises CheckpointError for a quantization that the engine cannot run.
    """
    geometry = geometry_of(checkpoint)
    scheme = scheme_of(checkpoint.config)
    dtype = dtype or checkpoint.dtype
    with checkpoint.reader(device) as read:
        layers = [
            _load_layer(checkpoint, read, layer_name(i), geometry, scheme, dtype)
            for i in range(geometry.layers)
        ]
        embedding = read(EMBEDDING).to(dtype)
        final_norm = read(FINAL_NORM).to(dtype)
        head = embedding if geometry.tied_head else read(HEAD).to(dtype)
    rope = LlamaRotaryEmbedding(config=hf_config(checkpoint)).to(device)
    return Decoder(geometry, embedding, layers, final_norm, head, rope)


def _load_layer(
    checkpoint: Checkpoint,
    read: TensorReader,
    prefix: str,
    geometry: Geometry,
    scheme: Scheme | None,
    dtype: torch.dtype,
) -> Layer:
    def stored(name: str) -> StoredLinear:
        full = f"{prefix}.{name}"
        packed = f"{full}.weight_packed"
        weight = read(packed if packed in checkpoint.tensors else f"{full}.weight")
        scale = f"{full}.weight_scale"
        bias = f"{full}.bias"
        return StoredLinear(
            weight,
            read(scale) if scale in checkpoint.tensors else None,
            read(bias).to(dtype) if bias in checkpoint.tensors else None,
        )

    def linear(*names: str) -> Linear:
        return make_linear([stored(name) for name in names], scheme, dtype)

    def norm(name: str) -> Tensor:
        return read(f"{prefix}.{name}.weight").to(dtype)

    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=norm("self_attn.q_norm") if geometry.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if geometry.qk_norm else None,
        out=linear("self_attn.o_proj"),
        post_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
