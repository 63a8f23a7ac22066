"""Rotary position embedding (RoPE), arXiv 2104.09864, with the scalings that transformers knows.

transformers' own module is the same, but importing its model code takes longer than reading a small model.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinier.families import rope_parameters


class Rope:
    def __init__(self, config: PretrainedConfig, device: torch.device, key: str = "") -> None:
        """key: one of families.rope_keys."""
        parameters = rope_parameters(config, key)
        kind = parameters["rope_type"]
        if kind == "default":
            size = getattr(config, "head_dim", None)
            size = size or config.hidden_size // config.num_attention_heads
            exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
            frequencies, self._scale = 1 / parameters["rope_theta"] ** exponents, 1.0
        else:
            named = {"layer_type": key} if key else {}
            frequencies, self._scale = ROPE_INIT_FUNCTIONS[kind](config, **named)
        self._frequencies = frequencies.float().to(device)  # [head_dim / 2]

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [T], each [T, head_dim], halves alike."""
        angles = positions.float().unsqueeze(-1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return cos.to(dtype), sin.to(dtype)
