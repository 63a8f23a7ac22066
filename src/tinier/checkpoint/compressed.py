"""The compressed-tensors layout of quantized weights, which transformers, vLLM and SGLang load.

`quantization_config` writes the block of config.json, `compressed_layout` reads it back, `compressed_pack`
lays out the tensors of one linear layer and `compressed_unpack` reads them. Schema and packing of integers
are the package's own; it is imported where it is used, because that takes seconds.
"""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from tinier.errors import CheckpointError, SchemeError
from tinier.numerics import (
    Quantized,
    e2m1_codes,
    e2m1_values,
    e8m0_codes,
    e8m0_values,
    from_pairs,
    to_pairs,
)
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR, Grid, Layout, Scheme

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

Value = TypeVar("Value")
_SCALE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}


def storage_format(scheme: Scheme) -> str:
    """compressed-tensors' name for how the codes lie on disk."""
    grid = scheme.weights
    if grid.scale_format != "model":
        return {"e4m3": "nvfp4-pack-quantized", "e8m0": "mxfp4-pack-quantized"}[grid.scale_format]
    if grid.kind != "int":
        return "float-quantized"
    return "int-quantized" if grid.bits == 8 else "pack-quantized"


def quantization_config(layout: Layout, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. names: every linear layer of the model, head included.

    One scheme targets every Linear but those it leaves alone; several are listed by layer name, as
    TensorRT-LLM wants it, and so are a quantized embedding and head, which are no Linear to vLLM.
    """
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    schemes = list(dict.fromkeys(layout.schemes.values()))
    by_class = len(schemes) == 1 and not {HEAD_LINEAR, EMBEDDING_MODULE} & layout.schemes.keys()
    groups = {}
    for i, scheme in enumerate(schemes):
        members = [name for name, own in layout.schemes.items() if own == scheme]
        groups[f"group_{i}"] = QuantizationScheme(
            targets=["Linear"] if by_class else members,
            weights=_to_args(scheme.weights, dynamic=False),
            input_activations=_to_args(scheme.activations, dynamic=_dynamic(scheme.activations))
            if scheme.activations
            else None,
            format=storage_format(scheme),
        )
    formats = {storage_format(scheme) for scheme in schemes}
    kv = layout.kv_cache
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=_to_args(kv, dynamic=False) if kv else None,
        ignore=[name for name in names if name not in layout.schemes],
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped


def compressed_layout(block: dict[str, Any], names: Iterable[str]) -> Layout:
    """How a checkpoint with this `quantization_config` stores each of `names`, its linear layers, and its
    embedding.

    Raises CheckpointError for a format that tinier cannot run.
    """
    if block.get("transform_config"):
        raise CheckpointError(
            "the model's inputs are rotated before they are multiplied (transform_config), which this "
            "tinier does not do. Give the 16-bit model."
        )
    schemes: dict[str, Scheme] = {}
    ignored = _Targets(dict.fromkeys(block.get("ignore") or [], True))
    targets: dict[str, Scheme] = {}
    for group in block.get("config_groups", {}).values():
        scheme = _to_scheme(group)
        for target in group.get("targets", []):
            targets.setdefault(target, scheme)
    found = _Targets(targets)
    for name in names:
        hit = None if ignored.find(name) else found.find(name)
        if hit is not None:
            schemes[name] = hit
    embedding = found.find(EMBEDDING_MODULE, "Embedding")
    if embedding is not None and not ignored.find(EMBEDDING_MODULE, "Embedding"):
        schemes[EMBEDDING_MODULE] = embedding
    kv = block.get("kv_cache_scheme")
    return Layout(schemes=schemes, kv_cache=_to_kv_grid(kv) if kv else None)


def compressed_pack(
    quantized: Quantized, scheme: Scheme, input_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors of one linear layer by the name they have on disk, without the layer's prefix.

    8 bits: `weight` [out, in] int8 or float8_e4m3fn. Fewer: `weight_packed`, int32 [out, in·bits/32]
    with `weight_shape` [2] for integers, uint8 [out, in/2] for FP4. All: `weight_scale`, and
    `weight_zero_point` [out·bits/32, groups] where the grid has one. input_scale: [1], the scale of
    static activations (NVFP4: what their scales are divided by).
    """
    grid = scheme.weights
    codes, scale, zero_point, global_scale = quantized
    packed: dict[str, Tensor] = {}
    if grid.kind == "float" and grid.bits == 4:
        packed["weight_packed"] = to_pairs(e2m1_codes(codes))
    elif grid.bits == 8:
        packed["weight"] = codes
    else:
        packed["weight_packed"] = pack_integers(codes, grid.bits)
        packed["weight_shape"] = torch.tensor(codes.shape)
    if grid.scale_format == "e8m0":
        scale = e8m0_codes(scale)
    packed["weight_scale"] = scale.reshape(1) if grid.granularity == "tensor" else scale
    if zero_point is not None:
        packed["weight_zero_point"] = pack_integers(zero_point, grid.bits, packed_dim=0)
    if global_scale is not None:
        packed["weight_global_scale"] = global_scale
    if scheme.input_scale_name and input_scale is not None:
        packed[scheme.input_scale_name] = input_scale
    return packed


def compressed_unpack(
    read: Callable[[str], Tensor | None], name: str, scheme: Scheme
) -> tuple[Quantized, Tensor | None]:
    """The codes and the input scale of the linear layer `name`. read: gives a stored tensor by its full
    name, None where there is none (Checkpoint.optional)."""

    def part(tensor: str) -> Tensor | None:
        return read(f"{name}.{tensor}")

    grid = scheme.weights
    scale, packed = part("weight_scale"), part("weight_packed")
    assert scale is not None
    scale = scale.reshape(1, 1) if grid.granularity == "tensor" else scale
    zero_point = None
    if grid.kind == "float" and grid.bits == 4:
        assert packed is not None
        codes = e2m1_values(from_pairs(packed))
    elif grid.bits == 8:
        weight = part("weight")
        assert weight is not None
        codes = weight
    else:
        assert packed is not None
        columns = scale.shape[1] * (grid.group_size or 1)
        codes = unpack_integers(packed, grid.bits, torch.Size((packed.shape[0], columns)))
        zeros = part("weight_zero_point")
        if zeros is not None:
            zero_point = unpack_integers(zeros, grid.bits, scale.shape, packed_dim=0)
    if grid.scale_format == "e8m0":
        scale = e8m0_values(scale)
    input_scale = part(scheme.input_scale_name) if scheme.input_scale_name else None
    return Quantized(codes, scale, zero_point, part("weight_global_scale")), input_scale


def compressed_shapes(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that `compressed_pack` gives for a linear layer of `shape` [out, in]."""
    rows, columns = shape
    grid = scheme.weights
    blocks = grid.blocks(shape)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_scale": (1,) if grid.granularity == "tensor" else blocks
    }
    if grid.bits == 8:
        shapes["weight"] = (rows, columns)
    elif grid.kind == "float":
        shapes["weight_packed"] = (rows, columns // 2)
    else:
        shapes["weight_packed"] = (rows, -(-columns * grid.bits // 32))
    if not grid.symmetric:
        shapes["weight_zero_point"] = (-(-rows * grid.bits // 32), blocks[1])
    if grid.scale_format == "e4m3":
        shapes["weight_global_scale"] = (1,)
    if scheme.input_scale_name:
        shapes[scheme.input_scale_name] = (1,)
    return shapes


def pack_integers(codes: Tensor, bits: int, packed_dim: int = 1) -> Tensor:
    """Codes [n, m] of -2^(bits-1) and up as int32 words [n, m·bits/32], less their smallest, the first in
    the lowest bits; packed_dim 0: along the rows."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: Tensor = pack_to_int32(codes, bits, packed_dim=packed_dim)
    return packed


def unpack_integers(packed: Tensor, bits: int, shape: torch.Size, packed_dim: int = 1) -> Tensor:
    """The inverse of `pack_integers`, int8 of `shape`."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes: Tensor = unpack_from_int32(packed, bits, shape, packed_dim=packed_dim)
    return codes


def _dynamic(grid: Grid) -> bool | str:
    if grid.scale_format == "e4m3":
        return "local"  # the scale over the scales is calibrated, those of the groups are not
    return grid.granularity != "tensor"


def _to_args(grid: Grid, *, dynamic: bool | str) -> "QuantizationArgs":
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=grid.bits,
        type="int" if grid.kind == "int" else "float",
        symmetric=grid.symmetric,
        strategy="tensor_group" if grid.scale_format == "e4m3" else grid.granularity,
        group_size=grid.group_size if grid.granularity == "group" else None,
        block_structure=[grid.group_size] * 2 if grid.granularity == "block" else None,
        dynamic=dynamic,
        scale_dtype=_SCALE_DTYPES.get(grid.scale_format),
        zp_dtype=None if grid.symmetric else torch.int8,
    )


def _to_scheme(group: dict[str, Any]) -> Scheme:
    weights, activations = group.get("weights"), group.get("input_activations")
    if weights is None or group.get("output_activations"):
        raise CheckpointError(
            "the model quantizes only activations, or the outputs of layers; tinier runs neither. "
            "Give the 16-bit model."
        )
    scheme = Scheme(
        weights=_to_grid(weights, of="weights"),
        activations=_to_grid(activations, of="activations") if activations else None,
    )
    told = group.get("format")
    if told not in (None, storage_format(scheme)):
        raise CheckpointError(
            f"the model stores {scheme.label} as {told!r}; tinier reads {storage_format(scheme)!r}. "
            "Give the 16-bit model."
        )
    return scheme


def _to_grid(args: dict[str, Any], *, of: str) -> Grid:
    """The grid of compressed-tensors' arguments. Raises CheckpointError where there is none."""
    strategy, block = args.get("strategy"), args.get("block_structure")
    kind, bits = args.get("type"), args.get("num_bits")
    scales = "model"
    if strategy == "tensor_group":
        scales = "e4m3"
    elif kind == "float" and bits == 4:
        scales = "e8m0"
    try:
        grid = Grid(
            kind=kind,  # type: ignore[arg-type]
            bits=bits,  # type: ignore[arg-type]
            granularity="group" if strategy == "tensor_group" else strategy,  # type: ignore[arg-type]
            group_size=block[0] if block else args.get("group_size") or None,
            symmetric=args.get("symmetric", True),
            scale_format=scales,  # type: ignore[arg-type]
        )
        known = (
            kind in ("int", "float")
            and bits in (2, 3, 4, 8)
            and strategy in ("tensor", "channel", "group", "block", "token", "tensor_group")
            and args.get("actorder") in (None, "weight", "static")
            and (block is None or block[0] == block[1])
            and args.get("dynamic", False) == (_dynamic(grid) if of == "activations" else False)
            and (grid.scale_format != "e8m0" or grid.group_size == 32)
            and (grid.symmetric or grid.bits < 8)
            and (of != "weights" or grid.granularity != "token")
            and (of != "activations" or _is_computed(grid))
            and (of != "cache" or grid.symmetric)
        )
    except SchemeError:
        known = False
    if not known:
        values = ", ".join(f"{name}={value!r}" for name, value in args.items() if value is not None)
        raise CheckpointError(
            f"the model is quantized with {values}, which this tinier cannot run. See the presets of "
            "`tinier quantize --help` for what it can."
        )
    return grid


def _is_computed(activations: Grid) -> bool:
    """Whether the kernels round inputs to this very grid (kernels/linear.py)."""
    if not activations.symmetric:
        return False
    if activations.bits == 8:
        by_group = activations.granularity == "group" and activations.kind == "float"
        return activations.granularity in ("tensor", "token") or by_group
    return activations.scale_format in ("e4m3", "e8m0")


def _to_kv_grid(args: dict[str, Any]) -> Grid:
    grid = _to_grid(args, of="cache")
    if grid.granularity != "tensor" or grid.bits != 8:
        raise CheckpointError(
            "the model's KV cache is quantized in another way than with one scale for all keys and "
            "one for all values of a layer, 8 bits each; tinier runs no other. Give the 16-bit model."
        )
    return grid


class _Targets(Generic[Value]):
    """What layers are called in config.json: by name, by a pattern, or by class. Mixtures have tens of
    thousands, each with its name."""

    def __init__(self, values: dict[str, Value]) -> None:
        self._values = values
        self._patterns = [
            (re.compile(target[3:]), value)
            for target, value in values.items()
            if target.startswith("re:")
        ]

    def find(self, name: str, of_class: str = "Linear") -> Value | None:
        """Of a layer: its own name goes before a pattern, and that before its class."""
        if name in self._values:
            return self._values[name]
        hit = next((value for pattern, value in self._patterns if pattern.match(name)), None)
        return hit if hit is not None else self._values.get(of_class)
