"""Walk the decoder layer by layer: transformers' own modules, one layer's weights in memory.

Start at `DecoderWalk`, or at `walk` where a layer is only looked at. In: a checkpoint and windows
[n, length] of token ids. Hidden states [n, length, hidden] stay in host memory; a batch of them is on
the device at a time. Peak memory is one layer, its hidden states and one batch, whatever the depth.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinier.calibration.experts import unfuse
from tinier.checkpoint import Checkpoint
from tinier.device import bf16_products
from tinier.errors import InputError, TextError
from tinier.families import EMBEDDING, Geometry, geometry_of, hf_config, layer_name, rope_keys
from tinier.numerics import Quantized, dequantize
from tinier.progress import bar

BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class LayerStep:
    index: int
    module: nn.Module
    """transformers' decoder layer, weights loaded, on the device"""
    inputs: Tensor
    """[windows, length, hidden]"""
    outputs: Tensor
    """[windows, length, hidden]"""


def check_attention_window(checkpoint: Checkpoint, length: int) -> None:
    """Raise TextError for windows longer than a layer's sliding attention, which `walk` leaves out."""
    windows = (w for w in geometry_of(checkpoint).windows if w is not None)
    shortest = min(windows, default=length)
    if length > shortest:
        raise TextError(
            f"windows of {length} tokens exceed sliding attention of {shortest}. "
            f"Use --length {shortest} or less."
        )


class DecoderWalk:
    """The layers of a 16-bit checkpoint, each loaded onto `device` when its turn comes.

    Raises TextError where `length` is more than a layer's sliding attention window.
    """

    def __init__(self, checkpoint: Checkpoint, length: int, device: torch.device) -> None:
        check_attention_window(checkpoint, length)
        geometry = geometry_of(checkpoint)
        self._checkpoint = checkpoint
        self.device = device
        model = _without_weights(checkpoint, geometry, checkpoint.dtype)
        self._layers = model.model.layers
        # a rotary embedding computes its frequencies when it is made, so it must not be made on meta
        rotary = type(model.model.rotary_emb)(config=model.config).to(device)
        sample = torch.empty(1, dtype=checkpoint.dtype, device=device)
        at = torch.arange(length, device=device).unsqueeze(0)
        self._times = geometry.multipliers.embedding
        turned = turns(rotary, sample, at, model.config)
        self._positions = [turned[kind.rope or next(iter(turned))] for kind in geometry.kinds]
        self.batch_windows = max(1, BATCH_TOKENS // length)

    def positions(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """cos and sin that a layer takes, each [1, length, head_dim]; one without RoPE looks at none."""
        return self._positions[layer.self_attn.layer_idx]  # type: ignore[union-attr,index]

    @torch.no_grad()
    def embed(self, windows: Tensor, quantized: Quantized | None = None) -> Tensor:
        """The hidden states that enter the first layer. windows: [n, length]. On the host.

        quantized: an embedding in place of the checkpoint's.
        """
        if quantized is None:
            with self._checkpoint.reader() as read:
                hidden = nn.functional.embedding(windows, read(EMBEDDING))
        else:
            table = dequantize(quantized, self._checkpoint.dtype)
            hidden = nn.functional.embedding(windows.to(table.device), table).cpu()
        hidden = hidden if self._times == 1 else hidden * self._times
        # pinned memory moves to and from a GPU several times faster
        return hidden.pin_memory() if self.device.type == "cuda" else hidden

    def load(self, index: int) -> nn.Module:
        """transformers' decoder layer with the checkpoint's weights, on the device; a new module."""
        prefix = layer_name(index)
        # a reader for each layer: an open file keeps what was read from it in memory
        with self._checkpoint.reader(self.device) as read:
            names = self._layers[index].state_dict()
            weights = {name: read(f"{prefix}.{name}") for name in names}
        return self.module(index, weights)

    def module(self, index: int, weights: dict[str, Tensor]) -> nn.Module:
        """transformers' decoder layer with these weights, by name inside it; a new module."""
        layer: nn.Module = copy.deepcopy(self._layers[index])
        layer.load_state_dict(weights, assign=True)
        return layer.requires_grad_(False)

    @torch.no_grad()
    def run(
        self,
        layer: nn.Module,
        hidden: Tensor,
        out: Tensor,
        cache: Any = None,
        *,
        finite: bool = True,
    ) -> Tensor:
        """Send hidden states [n, length, hidden] through a layer into `out`, which may be `hidden`.

        cache: what the attention hands its keys and values to. finite: raise InputError where the layer's
        outputs are no numbers.
        """
        for inputs, outputs in zip(
            hidden.split(self.batch_windows), out.split(self.batch_windows), strict=True
        ):
            found = self.forward(layer, inputs.to(self.device, non_blocking=True), cache)
            if finite and not torch.isfinite(found).all():
                name = layer_name(layer.self_attn.layer_idx)  # type: ignore[arg-type,union-attr]
                dtype = str(self._checkpoint.dtype).removeprefix("torch.")
                raise InputError(
                    f"the hidden states after {name} are no numbers (NaN or Inf), in {dtype}: the layer "
                    "overflows, or its inputs are broken. A float16 model may need dtype bfloat16 in its "
                    "config.json."
                )
            outputs.copy_(found)
        return out

    def forward(self, layer: nn.Module, batch: Tensor, cache: Any = None) -> Tensor:
        """One batch [windows, length, hidden] on the device through a layer."""
        more = {} if cache is None else {cache_keyword(layer): cache}
        with bf16_products(self.device):
            output: Tensor = layer(batch, position_embeddings=self.positions(layer), **more)
        return output


def cache_keyword(module: nn.Module) -> str:
    """What a decoder layer or its attention calls the cache: `cache` since transformers 5.24."""
    names = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def turns(
    rotary: nn.Module, sample: Tensor, positions: Tensor, config: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """What transformers' rotary embedding gives for positions [1, length], by families.rope_keys. sample:
    of the type to give it in."""
    return {
        key: rotary(sample, positions, key) if key else rotary(sample, positions)
        for key in rope_keys(config)
    }


@torch.no_grad()
def load_whole(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model of a 16-bit checkpoint, whole, with nothing to train.

    Its weights come from our reader and not from transformers', so that every stage sees the same ones.
    """
    geometry = geometry_of(checkpoint)
    model = _without_weights(checkpoint, geometry, dtype)
    with checkpoint.reader(device) as read:
        weights = {name: read(name).to(dtype) for name in checkpoint.tensors}
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    # a rotary embedding computes its frequencies when it is made, so it must not be made on meta
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    embedding = model.model.embed_tokens
    if hasattr(
        embedding, "embed_scale"
    ):  # Gemma's factor, rounded as the checkpoint's type rounds it
        times = geometry.multipliers.embedding
        embedding.embed_scale = torch.tensor(times, device=device)
    values = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, value in values if value.is_meta]
    assert not left, left
    return model.requires_grad_(False)


@torch.no_grad()
def walk(
    checkpoint: Checkpoint, windows: Tensor, *, device: torch.device, label: str
) -> Iterator[LayerStep]:
    """Yield each decoder layer with what flows in and out of it. windows: [n, length] token ids.

    The checkpoint must not be quantized. Raises TextError where a window is longer than a layer's
    sliding attention window.
    """
    count = geometry_of(checkpoint).layers
    with bar(label, count) as advance:
        decoder = DecoderWalk(checkpoint, windows.shape[1], device)
        hidden = decoder.embed(windows)
        for index in range(count):
            layer = decoder.load(index)
            outputs = decoder.run(layer, hidden, torch.empty_like(hidden))
            yield LayerStep(index, layer, hidden, outputs)
            hidden = outputs
            advance(1)


def _without_weights(checkpoint: Checkpoint, geometry: Geometry, dtype: torch.dtype) -> Any:
    """transformers' model on the meta device, each expert a module of its own."""
    from transformers import AutoModelForCausalLM  # takes a second, and torch's compiler along

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(checkpoint), dtype=dtype)
        for layer in model.model.layers:
            unfuse(layer, geometry, model.config)
    return model
