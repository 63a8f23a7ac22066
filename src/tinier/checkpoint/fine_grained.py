"""transformers' fine-grained FP8, DeepSeek's: E4M3 weights in blocks.

`weight` E4M3 [out, in] and `weight_scale_inv` float32 [out/128, in/128], which multiplies despite its name;
inputs are rounded in groups of 128 columns while the layer runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from tinier.checkpoint.awq import converted
from tinier.errors import CheckpointError, SchemeError
from tinier.numerics import Quantized
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR, PRESETS, Layout, Scheme

_SCHEME = PRESETS["fp8-block"].scheme


def fine_grained_layout(block: dict[str, Any], names: Iterable[str]) -> Layout:
    """How a checkpoint with this `quantization_config` stores each of `names`, its linear layers.

    Raises CheckpointError for what tinier does not compute.
    """
    size, scheme = block.get("weight_block_size"), block.get("activation_scheme", "dynamic")
    if size != [128, 128] or scheme != "dynamic" or block.get("scale_fmt") not in (None, "float"):
        raise CheckpointError(
            f"an FP8 checkpoint with weight_block_size={size!r}, activation_scheme={scheme!r}, "
            f"scale_fmt={block.get('scale_fmt')!r}; tinier reads blocks of 128 x 128 with dynamic inputs. "
            "Give the 16-bit model."
        )
    return Layout(schemes=dict.fromkeys(converted(block, names), _SCHEME), storage="fp8")


def fine_grained_config(layout: Layout, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a layout. Raises SchemeError for one that has no word for it."""
    ends = {HEAD_LINEAR, EMBEDDING_MODULE} & layout.schemes.keys()
    if set(layout.schemes.values()) != {_SCHEME} or layout.kv_cache is not None or ends:
        raise SchemeError(
            "transformers' fine-grained FP8 has all layers in blocks of 128 x 128, and head, embedding and "
            f"KV cache in 16 bit; this one is {layout.label}. Quantize with fp8-block."
        )
    left = [name for name in names if name not in layout.schemes]
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "modules_to_not_convert": left,
    }  # fmt: skip


def fine_grained_shapes(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a linear layer [out, in]."""
    return {"weight": shape, "weight_scale_inv": scheme.weights.blocks(shape)}


def fine_grained_pack(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear layer by their names."""
    return {"weight": quantized.codes, "weight_scale_inv": quantized.scale.float()}


def fine_grained_unpack(read: Callable[[str], Tensor | None], name: str) -> Quantized:
    """Codes and scales of the linear layer `name`."""
    codes, scale = read(f"{name}.weight"), read(f"{name}.weight_scale_inv")
    assert codes is not None
    assert scale is not None
    return Quantized(codes, scale)
