"""What a GGUF file says about the model's positions and sizes, to hold the converter to it.

transformers converts weights and sizes and leaves RoPE's scaling out. Start at `rope_parameters`, which
reads it, and `check_converted`, which compares what was written with what the file says.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinier.errors import CheckpointError

# the scaling of Llama 3.1 and 3.2: everything but the factor, which the file's own numbers show
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
}  # fmt: skip


class GgufFile:
    """The header of a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that is none."""
        import gguf

        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self._architecture = str(self._reader.fields["general.architecture"].contents())
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise CheckpointError(
                f"{path} is no GGUF file, or is damaged ({error}). Download it again."
            ) from None

    def value(self, name: str) -> Any:
        """An entry of this architecture, such as `rope.freq_base`; None where there is none."""
        field = self._reader.fields.get(f"{self._architecture}.{name}")
        return None if field is None else field.contents()

    def tensor(self, name: str) -> Tensor | None:
        """A small tensor of float32 numbers by name."""
        for tensor in self._reader.tensors:
            if tensor.name == name:
                return torch.tensor(tensor.data.copy()).float()
        return None


def rope_parameters(file: GgufFile, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json with the file's scaling.

    rope: the converter's. Raises CheckpointError for a scaling that transformers has no name for.
    """
    theta = float(file.value("rope.freq_base") or rope.get("rope_theta") or 10_000.0)
    plain = {"rope_type": "default", "rope_theta": theta}
    rotated = file.value("rope.dimension_count")
    if rotated is not None and rotated != head_dim:
        raise CheckpointError(
            f"{file.path} turns {rotated} of {head_dim} channels of a head; tinier turns all. Give the "
            "original model."
        )
    factors = file.tensor("rope_freqs.weight")
    kind = file.value("rope.scaling.type")
    if factors is not None and factors.max() > 1:
        return plain | _llama3(file, factors, head_dim, theta)
    if kind in (None, "none", ""):
        return plain
    factor = file.value("rope.scaling.factor")
    if kind == "linear" and factor:
        return plain | {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        return plain | _yarn(file, float(factor))
    raise CheckpointError(
        f"{file.path} scales positions by {kind!r} (factor {factor}), which cannot be told to "
        "transformers. Give the original model."
    )


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> Tensor:
    """What Llama 3 divides RoPE's frequencies by, as llama.cpp's converter writes it: [head_dim / 2].

    Waves shorter than original / high stay, those longer than original / low are stretched by
    `factor`; in between it goes over smoothly.
    """
    found = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (i / head_dim)
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)


def check_converted(file: GgufFile, config: dict[str, Any]) -> None:
    """Raise CheckpointError where the converter wrote other sizes than the file says."""
    for name, key in _SIZES.items():
        told, written = file.value(name), config.get(key)
        if told is None or written is None or isinstance(told, list):
            continue
        if not math.isclose(told, written, rel_tol=1e-6):
            raise CheckpointError(
                f"{file.path} says {name}={told}, and transformers made {key}={written} of it. The model "
                "would be another one. Give the original model."
            )


def _llama3(file: GgufFile, factors: Tensor, head_dim: int, theta: float) -> dict[str, Any]:
    factor = factors.max().item()
    expected = llama3_factors(
        head_dim, theta, factor, _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"],
        int(_LLAMA3["original_max_position_embeddings"]),
    )  # fmt: skip
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{file.path} has frequencies (rope_freqs.weight) that are not Llama 3's scaling, the one that "
            "can be told to transformers. Give the original model."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    original = file.value("rope.scaling.original_context_length")
    if original is None:
        raise CheckpointError(
            f"{file.path} scales positions by YaRN and does not say from which length. Give the original "
            "model."
        )
    found: dict[str, Any] = {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original),
    }  # fmt: skip
    for end in ("fast", "slow"):
        beta = file.value(f"rope.scaling.yarn_beta_{end}")
        if beta is not None:
            found[f"beta_{end}"] = float(beta)
    scaled = file.value("rope.scaling.yarn_attn_factor") or file.value("rope.scaling.attn_factor")
    if scaled is not None and scaled != 1:
        found["attention_factor"] = float(scaled) * (0.1 * math.log(factor) + 1)
    return found
