"""How numbers are stored (`Scheme`), and the names users give to the usual choices (`PRESETS`).

A scheme says nothing about how the codes are chosen: that is the algorithm, named beside it in a
preset. Nothing edits a scheme after construction; use `dataclasses.replace`.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from tinier.errors import SchemeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The grid that the numbers of one tensor are rounded to. Symmetric: zero is code zero."""

    kind: Literal["int", "float"]
    """`int`: evenly spaced codes. `float`: E4M3 at 8 bits."""
    bits: Literal[4, 8]
    """Width of one stored code."""
    granularity: Literal["channel", "group", "token"]
    """What shares one scale: an output channel, a group of input columns, or a token's row."""
    group_size: int | None = None
    """Input columns that share one scale; only with granularity `group`."""

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(
                f"granularity {self.granularity!r} with group_size={self.group_size}. "
                "A group size goes with granularity 'group' and with no other."
            )
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size={self.group_size}. Use a positive number, such as 64.")
        if self.kind == "float" and self.bits != 8:
            raise SchemeError(f"float grids have 8 bits here, not {self.bits}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    weights: Grid
    """How the weights of a linear layer are stored."""
    activations: Grid | None = None
    """How its inputs are rounded while it runs (dynamic scales); None leaves them in 16 bit."""

    @property
    def label(self) -> str:
        """Short name for tables, such as `W8A8-FP8` or `W4A16-INT g64`."""
        activation_bits = self.activations.bits if self.activations else 16
        kind = "FP" if self.weights.kind == "float" else "INT"
        group = f" g{self.weights.group_size}" if self.weights.group_size else ""
        return f"{kind}{self.weights.bits} W{self.weights.bits}A{activation_bits}{group}"

    def check_fits(self, name: str, in_features: int) -> None:
        """Raise SchemeError unless a linear layer with `in_features` columns can be stored so."""
        size = self.weights.group_size
        if size is not None and in_features % size:
            fitting = [d for d in (16, 32, 64, 128, 256) if in_features % d == 0]
            raise SchemeError(
                f"group size {size} does not divide the {in_features} input columns of {name}. "
                f"Sizes that do: {', '.join(map(str, fitting)) or 'none of the usual ones'}. "
                f"Use --group-size, or leave the layer in 16 bit: --ignore '{name}'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    scheme: Scheme
    algorithm: Literal["rtn"]
    """How the codes are chosen: round-to-nearest."""


_INT8_TOKEN = Grid(kind="int", bits=8, granularity="token")
_FP8_TOKEN = Grid(kind="float", bits=8, granularity="token")

PRESETS: dict[str, Preset] = {
    "fp8": Preset(
        scheme=Scheme(
            weights=Grid(kind="float", bits=8, granularity="channel"), activations=_FP8_TOKEN
        ),
        algorithm="rtn",
    ),
    "int8": Preset(
        scheme=Scheme(
            weights=Grid(kind="int", bits=8, granularity="channel"), activations=_INT8_TOKEN
        ),
        algorithm="rtn",
    ),
    "int4": Preset(
        scheme=Scheme(weights=Grid(kind="int", bits=4, granularity="group", group_size=128)),
        algorithm="rtn",
    ),
}


def preset_named(name: str, group_size: int | None = None) -> Preset:
    """The preset called `name`, with another group size if one is given.

    Raises SchemeError for an unknown name, or a group size where the preset has no groups.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SchemeError(f"preset {name!r} is not known. Presets: {', '.join(PRESETS)}.{hint}")
    preset = PRESETS[name]
    if group_size is None:
        return preset
    weights = preset.scheme.weights
    if weights.granularity != "group":
        grouped = [n for n, p in PRESETS.items() if p.scheme.weights.granularity == "group"]
        raise SchemeError(
            f"preset {name!r} has one scale per {weights.granularity} and takes no group size. "
            f"Presets with groups: {', '.join(grouped)}. Leave --group-size out."
        )
    scheme = replace(preset.scheme, weights=replace(weights, group_size=group_size))
    return replace(preset, scheme=scheme)
