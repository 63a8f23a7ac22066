"""What a model may take: limits as people type them, and as numbers.

Start at `Budget`. Sizes are bytes or a share of the base model's, throughput is tokens a second or times
the base model's; `Budget.limits` makes absolute numbers of them once the base was measured.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from tinier.benchmark import Workload
from tinier.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


class Amount(NamedTuple):
    """A limit, absolute or a factor of the base model's figure."""

    value: float
    relative: bool

    def of(self, base: float) -> float:
        return self.value * base if self.relative else self.value


@dataclass(frozen=True, slots=True)
class Figures:
    """What a budget is about, of one model."""

    size: float
    """Bytes on disk"""
    memory: float
    """Bytes at most while serving the load"""
    throughput: float
    """Output tokens a second under the load"""
    latency: float
    """Milliseconds between two tokens of a request (ITL) under the load"""
    quality: float
    """exp(-KL), the likelihood per token of the base's own text that is left"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the figures may be: at most, for throughput and quality at least; None: anything."""

    size: float | None = None
    memory: float | None = None
    throughput: float | None = None
    latency: float | None = None
    quality: float | None = None

    def broken(self, found: Figures) -> list[str]:
        """The names of the limits that a model does not keep."""
        names = []
        for name, limit in asdict(self).items():
            value = getattr(found, name)
            if limit is None:
                continue
            if value < limit if name in AT_LEAST else value > limit:
                names.append(name)
        return names


AT_LEAST = ("throughput", "quality")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits under one load. Raises InputError for numbers that make no sense."""

    max_size: Amount | None = None
    max_memory: Amount | None = None
    min_throughput: Amount | None = None
    max_latency: float | None = None
    min_quality: float | None = None
    load: Workload = field(default_factory=Workload)
    seconds: float = 3600.0
    """What the search may take."""

    def __post_init__(self) -> None:
        if self.seconds < 60:
            raise InputError(f"--time {self.seconds:g}s is too short. Give a minute or more: 1h.")
        if self.min_quality is not None and not 0 < self.min_quality < 1:
            raise InputError(
                f"--min-quality {100 * self.min_quality:g}% is not between 0% and 100%. Use 95%, or "
                "another share."
            )

    @property
    def limits_anything(self) -> bool:
        return any(
            value is not None for value in asdict(self.limits(Figures(1, 1, 1, 1, 1))).values()
        )

    def limits(self, base: Figures) -> Limits:
        """Absolute. base: the base model's figures."""

        def of(amount: Amount | None, figure: float) -> float | None:
            return None if amount is None else amount.of(figure)

        return Limits(
            size=of(self.max_size, base.size),
            memory=of(self.max_memory, base.memory),
            throughput=of(self.min_throughput, base.throughput),
            latency=self.max_latency,
            quality=self.min_quality,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_bytes(text: str, option: str) -> Amount:
    """`2.4GB`, `512MiB`, or `37.5%` of the base model's. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]?I?B)\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{option} {text!r} is no size. Use 2.4GB, 512MiB or 40% (of the base's).")
    if match[2] == "%":
        return Amount(float(match[1]) / 100, relative=True)
    return Amount(float(match[1]) * _UNITS[match[2]], relative=False)


def parse_throughput(text: str) -> Amount:
    """`2x`, times the base model's, or `1500`, tokens a second. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(x?)\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise InputError(
            f"--min-throughput {text!r} is no rate. Use 2x (the base's) or 1500 (output tokens a second)."
        )
    return Amount(float(match[1]), relative=match[2] == "x")


def parse_latency(text: str) -> float:
    """`20ms` between two tokens. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise InputError(f"--max-latency {text!r} is no time. Use 20ms (between two tokens).")
    return float(match[1]) * (1e3 if match[2] == "s" else 1)


def parse_quality(text: str) -> float:
    """`95%`. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        raise InputError(f"--min-quality {text!r} is no share. Use 95% (of the base's likelihood).")
    return float(match[1]) / 100


def parse_load(text: str) -> Workload:
    """`512/128@4`: tokens in, tokens out, requests at once. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*(?:@\s*(\d+))?\s*", text)
    if match is None:
        raise InputError(
            f"--load {text!r} is not understood. Use TOKENS_IN/TOKENS_OUT@AT_ONCE, such as 512/128@4."
        )
    return Workload(
        input_length=int(match[1]), output_length=int(match[2]), concurrency=int(match[3] or 1)
    )


def parse_seconds(text: str) -> float:
    """`90s`, `30m` or `2h`. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)\s*", text.lower())
    if match is None:
        raise InputError(f"--time {text!r} is no time. Use 90s, 30m or 2h.")
    return float(match[1]) * _SECONDS[match[2]]
