"""One user's request: its prompt, how to sample, what has been computed, and when."""

from dataclasses import dataclass, field

from tinier.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    max_tokens: int = 128
    """Output tokens at most."""
    temperature: float = 0.0
    """0: greedy, the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    seed: int = 0
    """Equal seeds give equal text, whatever else is in the batch."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output; they are not part of it."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens}. Use 1 or more.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}. Use 0 (greedy) or more.")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}. Use 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}. Use more than 0 and at most 1.")


@dataclass(slots=True, eq=False)
class Request:
    prompt: list[int]
    params: SamplingParams
    arrived: float
    """Seconds on the engine's clock (time.perf_counter)."""
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """Its cache blocks, in order."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    token_times: list[float] = field(default_factory=list)
    """When each output token was there."""
    finished: str | None = None
    """`stop` or `length` once it is done."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` token ids of prompt and output from position `start`."""
        end = start + count
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        return self.prompt[start:] + self.output[max(0, start - split) : end - split]
