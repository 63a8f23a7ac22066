"""RoPE is transformers', for every scaling that checkpoints may ask for."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinier.engine.rope import Rope

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=8, max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **SCALINGS[kind]},
    )  # fmt: skip
    positions = torch.arange(2048)
    ours = Rope(config, torch.device("cpu"))(positions, dtype)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions.unsqueeze(0))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.squeeze(0))
