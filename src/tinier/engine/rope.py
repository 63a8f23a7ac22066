"""Rotary position embedding (RoPE), arXiv 2104.09864, with the scalings that transformers knows.

transformers' own module is the same, but importing its model code takes longer than reading a small model.
"""

from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tinier.families import cached_from_transformers, rope_parameters

# scalings that turn longer sequences in another way
_BY_LENGTH = ("dynamic", "longrope")


class Rope:
    def __init__(self, config: SimpleNamespace, device: torch.device, key: str = "") -> None:
        """config: families.resolved_config. key: one of families.rope_keys."""
        self._config, self._device, self._key = config, device, key

    def __call__(
        self, positions: Tensor, longest: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [T], each [T, R] for the R channels of a head that turn, halves alike.

        longest: no sequence is longer. Dynamic scaling and LongRoPE (arXiv 2402.13753) turn longer ones
        in another way, all of their tokens, so that a KV cache must know it beforehand.
        """
        frequencies, scale = self._frequencies(longest)
        angles = positions.float().unsqueeze(-1) * frequencies.float().to(self._device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return cos.to(dtype), sin.to(dtype)

    @cached_property
    def _hf_config(self) -> Any:
        """transformers' own object, which its scalings want."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self._config.model_type].from_dict(vars(self._config))

    def _scaled_frequencies(self, longest: int) -> dict[str, Any]:
        """By transformers' function for the kind of scaling."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        kind = rope_parameters(self._config, self._key)["rope_type"]
        named = {"layer_type": self._key} if self._key else {}
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self._hf_config, seq_len=longest, **named)
        return {"frequencies": frequencies.tolist(), "scale": float(scale)}

    def _frequencies(self, longest: int) -> tuple[Tensor, float]:
        """[R / 2], and what cos and sin are multiplied with."""
        config, parameters = self._config, rope_parameters(self._config, self._key)
        kind = parameters["rope_type"]
        if kind != "default":
            of = [vars(self._config), self._key, longest if kind in _BY_LENGTH else None]
            kept = cached_from_transformers("ropes", of, partial(self._scaled_frequencies, longest))
            return torch.tensor(kept["frequencies"], dtype=torch.float32), kept["scale"]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turning = int(size * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, turning, 2, dtype=torch.float32) / turning
        return 1 / parameters["rope_theta"] ** exponents, 1.0
