"""The layouts of quantized weights that tinier reads and writes, by what config.json calls them.

A format says, of a `quantization_config`, how each layer is stored (`layout_of`); of a scheme, which
tensors a linear layer has (`stored_shapes`), and how codes become them (`pack_linear`) and are read from
them (`unpack_linear`). compressed-tensors is the one that the stages write; the others are for `tinier
export` and for checkpoints of other tools.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from tinier.checkpoint import awq, compressed, fine_grained, gptq, modelopt
from tinier.errors import CheckpointError, InputError, SchemeError
from tinier.numerics import Quantized
from tinier.schemes import Layout, Scheme, Storage

_LAYOUTS: dict[str, Callable[[dict[str, Any], Iterable[str]], Layout]] = {
    "compressed-tensors": compressed.compressed_layout,
    "gptq": gptq.gptq_layout,
    "awq": awq.awq_layout,
    "fp8": fine_grained.fine_grained_layout,
    "modelopt": modelopt.modelopt_layout,
}
_CONFIGS: dict[str, Callable[[Layout, Iterable[str]], dict[str, Any]]] = {
    "compressed-tensors": compressed.quantization_config,
    "gptq": gptq.gptq_config,
    "gptq_v2": gptq.gptq_config,
    "awq": awq.awq_config,
    "fp8": fine_grained.fine_grained_config,
    "modelopt": modelopt.modelopt_config,
}


def layout_of(config: dict[str, Any], names: Iterable[str]) -> Layout | None:
    """How a checkpoint stores each of `names`, its linear layers, and its embedding; None if it is not
    quantized. config: config.json.

    Raises CheckpointError for another quantization method, or a format that tinier cannot run.
    """
    block = config.get("quantization_config")
    if block is None:
        return None
    if not isinstance(block, dict):
        raise CheckpointError(
            f"quantization_config in config.json is {block!r:.40}, not an object. Download it again."
        )
    method = block.get("quant_method")
    if not isinstance(method, str) or method not in _LAYOUTS:
        raise CheckpointError(
            f"the model is quantized with {method!r}; tinier reads {', '.join(_LAYOUTS)}. "
            "Give the original 16-bit model."
        )
    try:
        return _LAYOUTS[method](block, names)
    except SchemeError as error:
        raise CheckpointError(f"the model's {method} quantization: {error}") from None
    except InputError:
        raise
    except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"quantization_config in config.json is damaged ({error!r}). Download it again."
        ) from None


def quantization_config(layout: Layout, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. names: every linear layer of the model, head included.

    Raises SchemeError for what the format has no word for: why, and what to quantize with.
    """
    return _CONFIGS[layout.storage](layout, names)


def stored_shapes(
    scheme: Scheme, shape: tuple[int, int], storage: Storage = "compressed-tensors"
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a linear layer of `shape` [out, in]; (): a number."""
    if storage in ("gptq", "gptq_v2"):
        return gptq.gptq_shapes(scheme, shape)
    if storage == "awq":
        return awq.awq_shapes(scheme, shape)
    if storage == "fp8":
        return fine_grained.fine_grained_shapes(scheme, shape)
    if storage == "modelopt":
        return modelopt.modelopt_shapes(scheme, shape)
    return compressed.compressed_shapes(scheme, shape)


def pack_linear(
    quantized: Quantized, scheme: Scheme, input_scale: Tensor | None = None,
    storage: Storage = "compressed-tensors",
) -> dict[str, Tensor]:  # fmt: skip
    """Tensors of one linear layer by the name they have on disk, without the layer's prefix. input_scale:
    [1], as `unpack_linear` gives it. Raises SchemeError for numbers that the format cannot hold."""
    if storage in ("gptq", "gptq_v2"):
        return gptq.gptq_pack(quantized, scheme, v2=storage == "gptq_v2")
    if storage == "awq":
        return awq.awq_pack(quantized)
    if storage == "fp8":
        return fine_grained.fine_grained_pack(quantized)
    if storage == "modelopt":
        return modelopt.modelopt_pack(quantized, scheme, input_scale)
    return compressed.compressed_pack(quantized, scheme, input_scale)


def unpack_linear(
    read: Callable[[str], Tensor | None], name: str, scheme: Scheme,
    storage: Storage = "compressed-tensors",
) -> tuple[Quantized, Tensor | None]:  # fmt: skip
    """The codes and the input scale of the linear layer `name`. read: gives a stored tensor by its full
    name, None where there is none (Checkpoint.optional). Raises CheckpointError for what tinier does not
    compute."""
    if storage in ("gptq", "gptq_v2"):
        return gptq.gptq_unpack(read, name, scheme, v2=storage == "gptq_v2"), None
    if storage == "awq":
        return awq.awq_unpack(read, name, scheme), None
    if storage == "fp8":
        return fine_grained.fine_grained_unpack(read, name), None
    if storage == "modelopt":
        return modelopt.modelopt_unpack(read, name, scheme)
    return compressed.compressed_unpack(read, name, scheme)
