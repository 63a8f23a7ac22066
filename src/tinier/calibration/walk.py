"""Walk the decoder layer by layer: transformers' own modules, one layer's weights in memory.

Start at `walk`. In: a checkpoint and windows [n, length]. Out: for each layer its module, the hidden
states that go in and those that come out, both [n, length, hidden] on the CPU. Peak memory is one
layer, two sets of hidden states and one batch on the device, whatever the depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.errors import TextError
from tinier.families import EMBEDDING, geometry_of, hf_config, layer_name
from tinier.progress import bar

_BATCH_TOKENS = 4096


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


@torch.no_grad()
def walk(
    checkpoint: Checkpoint, windows: Tensor, *, device: torch.device, label: str
) -> Iterator[LayerStep]:
    """Yield each decoder layer with what flows in and out of it. windows: [n, length] token ids.

    The checkpoint must not be quantized. Raises TextError where a window is longer than a layer's
    sliding attention window.
    """
    geometry = geometry_of(checkpoint)
    length = windows.shape[1]
    check_attention_window(checkpoint, length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(checkpoint), dtype=checkpoint.dtype)
    # a rotary embedding computes its frequencies when it is made, so it must not be made on meta
    rotary = type(model.model.rotary_emb)(config=model.config).to(device)
    with (
        checkpoint.reader(device) as read,
        bar(label, geometry.layers) as advance,
    ):
        hidden = nn.functional.embedding(windows, read(EMBEDDING).cpu())
        sample = hidden[:1, :, :].to(device)
        positions = rotary(sample, torch.arange(length, device=device).unsqueeze(0))
        for index, layer in enumerate(model.model.layers):
            prefix = layer_name(index)
            weights = {name: read(f"{prefix}.{name}") for name in layer.state_dict()}
            layer.load_state_dict(weights, assign=True)
            outputs = torch.cat(
                [
                    layer(batch.to(device), position_embeddings=positions).cpu()
                    for batch in hidden.split(max(1, _BATCH_TOKENS // length))
                ]
            )
            yield LayerStep(index, layer, hidden, outputs)
            layer.to("meta")
            hidden = outputs
            advance(1)
