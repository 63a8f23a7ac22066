"""Limits of one engine."""

from dataclasses import dataclass

from tinier.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_batch_size: int = 32
    """Requests computed at once; more wait."""
    max_seq_len: int = 4096
    """Prompt plus output of one request, in tokens; the model's own limit if that is lower."""
    max_step_tokens: int = 2048
    """New tokens computed in one step; longer prompts are computed in chunks of it."""
    block_size: int = 16
    """Tokens in one block of the KV cache."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache; None: what `max_batch_size` full requests need, but at most half of the
    device's free memory."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "max_step_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}. Use 1 or more.")
        if self.max_step_tokens < self.max_batch_size:
            raise InputError(
                f"max_step_tokens={self.max_step_tokens} is below max_batch_size="
                f"{self.max_batch_size}: every running request computes a token a step."
            )
