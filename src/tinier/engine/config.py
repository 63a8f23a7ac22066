"""Limits of one engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tinier.errors import InputError
from tinier.families import Geometry
from tinier.schemes import Int4Inputs

USUAL_SEQ_LEN = 4096
"""Tokens of the requests that a KV cache is sized for, unless it is told"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_batch_size: int = 32
    """Requests computed at once; more wait."""
    max_input_len: int | None = None
    """Prompt of one request, in tokens; None: as `max_seq_len`."""
    max_seq_len: int | None = None
    """Prompt plus output of one request, in tokens; the model's own limit if that is lower. None: as many
    as the model takes and the KV cache, sized for requests of 4,096, has room for. (Of models that turn
    longer sequences in another way, those they turn as short ones: rope.py.)"""
    max_step_tokens: int = 2048
    """New tokens computed in one step; longer prompts are computed in chunks of it."""
    block_size: int = 16
    """Tokens in one block of the KV cache: what prompts share is shared in whole blocks."""
    reuse_prefixes: bool = True
    """Take the cached blocks of earlier requests for prompts that start like them."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache; None: what `max_batch_size` full requests need, but at most what is free
    (on a CPU half of it)."""
    overlap: bool | None = None
    """Launch a step before the tokens of the one before are read; None: on a GPU."""
    draft: str | None = None
    """A smaller model with the same tokens that proposes the next ones, or `prompt`: what followed the same
    words earlier is proposed. The model checks several at once; its text stays the same (drafts.py)."""
    max_draft_tokens: int = 8
    """Tokens that `draft` proposes at once, at most: how many follows from what was right and what steps
    cost."""
    adapters: tuple[Path, ...] = ()
    """Folders of LoRA adapters beside the model: SamplingParams.adapter says which of them, from 1."""
    tensor_parallel: int = 1
    """GPUs, from `device` on, that share the model. The engine starts a process for each but the first,
    and ends its own if one of them ends."""
    int4_inputs: Int4Inputs = "int8"
    """Of INT4 weights on a CPU, and of a head that is an INT8 embedding: `int8` rounds the inputs to 8 bits
    with a scale for each 32 of them and multiplies in integers, which is faster; `16bit` leaves them."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: the GPU where there is one."""

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size",
            "max_seq_len",
            "max_step_tokens",
            "block_size",
            "max_draft_tokens",
            "tensor_parallel",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}. Use 1 or more.")
        if self.adapters and self.tensor_parallel > 1:
            raise InputError(
                f"tensor_parallel={self.tensor_parallel} with {len(self.adapters)} adapters of one model. "
                "Use one GPU, or merge an adapter: BASE+ADAPTER alone."
            )
        if self.int4_inputs not in get_args(Int4Inputs):
            raise InputError(f"int4_inputs={self.int4_inputs!r}. Use int8 or 16bit.")
        most = self.max_seq_len
        if self.max_input_len is not None and (
            self.max_input_len < 1 or (most is not None and self.max_input_len >= most)
        ):
            raise InputError(
                f"max_input_len={self.max_input_len} with max_seq_len={most}. "
                "Use at least 1, and less than max_seq_len: the output needs room too."
            )
        if self.max_step_tokens < self.max_batch_size:
            raise InputError(
                f"max_step_tokens={self.max_step_tokens} is below max_batch_size="
                f"{self.max_batch_size}: every running request computes a token a step. Use at least "
                f"{self.max_batch_size}."
            )

    def usual_len(self, geometry: Geometry) -> int:
        """Tokens of the requests that the KV cache is sized for."""
        return min(self.max_seq_len or USUAL_SEQ_LEN, geometry.max_positions)

    def longest(self, geometry: Geometry, room: int) -> int:
        """Tokens of one request at most. room: of the KV cache."""
        if self.max_seq_len is not None:
            return min(self.max_seq_len, geometry.max_positions)
        return min(geometry.alike_positions or geometry.max_positions, room)
