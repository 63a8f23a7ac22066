"""A checkpoint as llama.cpp's file: sizes, names, and each tensor in the type whose numbers it has.

Start at `write_gguf`. In: a checkpoint of a family that `_ARCHITECTURES` lists. Out: one file; codes are
carried over, nothing is rounded again. `read_back` compares it with the checkpoint by the `gguf` package's
own reader.
"""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor

from tinier.checkpoint import Checkpoint, TensorReader, unpack_linear
from tinier.checkpoint.gguf_file import llama3_factors
from tinier.errors import SchemeError
from tinier.exporting.gguf_blocks import block_type, packed
from tinier.exporting.gguf_tokenizer import add_tokenizer
from tinier.families import (
    HEAD_LINEAR,
    Geometry,
    checkpoint_layout,
    family_of,
    geometry_of,
    linear_shape,
    resolved_config,
    rope_keys,
    rope_parameters,
)
from tinier.numerics import Quantized, dequantize
from tinier.progress import bar
from tinier.schemes import Layout, Scheme, Storage


class Architecture(NamedTuple):
    name: str
    """llama.cpp's"""
    interleaves: bool
    """Whether RoPE turns neighbours there, so that the rows of q and k are put in that order"""
    has_nvfp4: bool = False
    """Whether its graph multiplies with the second scale of NVFP4: where it does not, logits are NaN"""


_ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", True, has_nvfp4=True),
    "MistralForCausalLM": Architecture("llama", True, has_nvfp4=True),
    "Qwen2ForCausalLM": Architecture("qwen2", False),
    "Qwen3ForCausalLM": Architecture("qwen3", False, has_nvfp4=True),
    "Gemma3ForCausalLM": Architecture("gemma3", False),
    "GraniteForCausalLM": Architecture("granite", True),
}
_FILE_TYPES = {
    GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.MXFP4: gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    GGMLQuantizationType.NVFP4: gguf.LlamaFileType.MOSTLY_NVFP4,
}
_ROW_NUMBERS = 1 << 23
"""Numbers that are compared at once"""
MOST_APART = 1e-3
"""Of a tensor's norm: what scales and zero points lose in float16"""
_SECOND = "weight_global_scale"
"""NVFP4's number for a whole tensor, by the name that follows its layer's"""
_NUMPY = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
_PLAIN = {
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float16: GGMLQuantizationType.F16,
    torch.float32: GGMLQuantizationType.F32,
}


class Model(NamedTuple):
    """A checkpoint, and what is to be known of it once."""

    checkpoint: Checkpoint
    geometry: Geometry
    schemes: dict[str, Scheme]
    """Of the quantized layers"""
    storage: Storage
    architecture: Architecture

    @classmethod
    def of(cls, source: Checkpoint) -> "Model":
        layout = checkpoint_layout(source) or Layout(schemes={})
        architecture = _ARCHITECTURES[family_of(source).architecture]
        return cls(source, geometry_of(source), layout.schemes, layout.storage, architecture)

    def codes(self, linear: str, read: TensorReader) -> Quantized:
        """Those of a quantized layer."""
        find, scheme = self.checkpoint.optional(read), self.schemes[linear]
        return unpack_linear(find, linear, scheme, self.storage)[0]


class Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    source: str
    """The linear layer, the embedding, or the tensor that it is made of"""
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """[rows, columns] or [size] of numbers"""


def gguf_refusal(source: Checkpoint) -> str | None:
    """Why a checkpoint cannot become a GGUF file, and what would work; None: it can."""
    architecture, layout = family_of(source).architecture, checkpoint_layout(source)
    if architecture not in _ARCHITECTURES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in _ARCHITECTURES)
        return f"tinier writes {known} as GGUF, and this is {architecture}."
    if architecture == "Gemma3ForCausalLM" and not _is_llama_cpps_gemma(source):
        return (
            "llama.cpp's Gemma 3 has every sixth layer see all positions, the others turn by a base of "
            "10,000, and queries divided by the root of a head's size; config.json says otherwise."
        )
    if layout is None:
        return None
    for name, scheme in layout.schemes.items():
        if block_type(scheme) is None:
            return (
                f"llama.cpp has no type for the numbers of {scheme.label} ({name}). Quantize with "
                "int4-gptq, int4-best, int4-awq or int4 (groups of 32, 64 or 128), int8, int8-sq, "
                "mxfp4-w4a16 or nvfp4-w4a16."
            )
        if (
            block_type(scheme) == GGMLQuantizationType.NVFP4
            and not _ARCHITECTURES[architecture].has_nvfp4
        ):
            return (
                f"llama.cpp's {architecture.removesuffix('ForCausalLM')} leaves the second scale of NVFP4 "
                "out, and its logits are NaN. Quantize with mxfp4-w4a16 or int4-gptq."
            )
    if layout.kv_cache is not None:
        return "a GGUF file says nothing of the KV cache. Quantize without --kv."
    return None


def _is_llama_cpps_gemma(source: Checkpoint) -> bool:
    """Whether a Gemma 3 is what llama.cpp takes for granted of one, for a file has no words for it."""
    geometry, config = geometry_of(source), resolved_config(source)
    sees_all = [window is None for window in geometry.windows]
    root = geometry.head_dim**-0.5
    local = rope_parameters(config, "sliding_attention")["rope_theta"]
    return (
        sees_all == [(i + 1) % 6 == 0 for i in range(geometry.layers)]
        and abs((geometry.multipliers.attention or root) - root) < 1e-6
        and local == 10_000
    )


def write_gguf(source: Checkpoint, path: Path) -> None:
    """Write the file, one tensor in memory at a time. Raises SchemeError for a tokenizer that llama.cpp has
    no name for."""
    model = Model.of(source)
    entries, factors = _entries(model), _rope_factors(source)
    writer = GGUFWriter(path, model.architecture.name)
    _add_sizes(writer, model)
    writer.add_file_type(_FILE_TYPES[_most(entries)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, source, model.geometry.vocab)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for entry in entries:
        block, size = gguf.GGML_QUANT_SIZES[entry.kind]
        num_bytes = math.prod(entry.shape) // block * size
        kind = np.dtype(np.float32)  # of what the bytes stand for
        writer.add_tensor_info(entry.name, entry.shape, kind, num_bytes, raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    with bar("export", len(entries)) as advance:
        for entry in entries:
            writer.write_tensor_data(_data(_stored(model, entry), entry.kind))
            advance(1)
    writer.close()


def read_back(source: Checkpoint, path: Path) -> float:
    """The largest difference of a tensor's numbers from the checkpoint's, as a share of its norm, as the
    `gguf` package reads them."""
    model = Model.of(source)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    entries, worst = _entries(model), 0.0
    with bar("read back", len(entries)) as advance, ThreadPoolExecutor(2) as pool:
        for found in pool.map(
            lambda e: _apart(_stored(model, e), e, stored[e.name], path), entries
        ):
            worst = max(worst, found)
            advance(1)
    return worst


def _apart(
    expected: Tensor | Quantized, entry: Entry, tensor: gguf.ReaderTensor, path: Path
) -> float:
    """A few rows at a time, which are read anew: what is mapped from a file stays in memory."""
    rows = entry.shape[0] if len(entry.shape) == 2 else 1
    row_bytes = int(tensor.n_bytes) // rows
    at_once = max(1, _ROW_NUMBERS * rows // math.prod(entry.shape))
    sums = torch.zeros(2, dtype=torch.float64)  # squares of the numbers, and of what they differ by
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        place = int(tensor.data_offset) + first * row_bytes
        data = np.fromfile(path, np.uint8, count * row_bytes, offset=place).reshape(count, -1)
        data = data.view(_NUMPY.get(entry.kind, np.uint8))
        found = torch.from_numpy(gguf.dequantize(data, entry.kind).astype(np.float32))
        wanted = _numbers(expected, first, count).view(found.shape)
        sums += torch.stack([wanted.square().sum(), (found - wanted).square().sum()]).double()
    size, difference = sums.sqrt().tolist()
    return float(difference / size if size else difference)


def _numbers(stored: Tensor | Quantized, first: int, count: int) -> Tensor:
    """Rows of a tensor in float32; of a vector, all."""
    if isinstance(stored, Tensor):
        return (stored[first : first + count] if stored.dim() == 2 else stored).float()
    rows = (None if part is None else part[first : first + count] for part in stored[:3])
    return dequantize(Quantized(*rows), torch.float32)  # type: ignore[arg-type]


def _entries(model: Model) -> list[Entry]:
    """Every tensor of the file, in the order of the layers."""
    source, geometry, architecture = model.checkpoint, model.geometry, model.architecture
    key = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(key, geometry.layers)
    entries, seen = [], set()
    for tensor in sorted(source.tensors, key=_place):
        linear = tensor.rpartition(".")[0]
        if linear in model.schemes and not tensor.endswith(".bias"):
            if linear in seen or (linear == HEAD_LINEAR and geometry.tied_head):
                continue
            seen.add(linear)
            found = block_type(model.schemes[linear])
            assert found is not None
            kind, origin, tensor = found, linear, f"{linear}.weight"
            shape: tuple[int, ...] = linear_shape(geometry, linear)
        else:
            shape, origin = source.tensors[tensor].shape, tensor
            kind = _PLAIN[source.dtype] if len(shape) == 2 else GGMLQuantizationType.F32
        name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SchemeError(
                f"llama.cpp's {architecture.name} has no tensor for {tensor}. Choose another format: "
                "tinier export --matrix"
            )
        entries.append(Entry(name, origin, kind, shape))
        if kind == GGMLQuantizationType.NVFP4:
            scale = name.removesuffix("weight") + "scale"
            entries.append(Entry(scale, f"{origin}.{_SECOND}", GGMLQuantizationType.F32, (1,)))
    return entries


def _place(tensor: str) -> tuple[int, int]:
    """Embedding, layers by their number, then what follows them."""
    if tensor.startswith("model.layers."):
        return 1, int(tensor.split(".")[2])
    return (0, 0) if "embed" in tensor else (2, 0)


def _most(entries: list[Entry]) -> GGMLQuantizationType:
    """The type of most matrices."""
    return Counter(e.kind for e in entries if len(e.shape) == 2).most_common(1)[0][0]


def _stored(model: Model, entry: Entry) -> Tensor | Quantized:
    """A tensor with its rows in llama.cpp's order."""
    linear, _, last = entry.source.rpartition(".")
    with model.checkpoint.reader() as read:  # one for each: an open file keeps what was read
        if entry.source in model.schemes:
            codes = model.codes(entry.source, read)._replace(global_scale=None)  # beside the tensor
            order = _rope_order(model, last)
            return codes if order is None else _reordered(codes, order)
        if last == _SECOND:
            divisor = model.codes(linear, read).global_scale
            assert divisor is not None
            return 1 / divisor
        tensor = read(entry.source)
    if entry.source.endswith(
        "norm.weight"
    ):  # Gemma's are what 1 is added to, here before it is stored
        return tensor.float() + model.geometry.norm_offset
    order = _rope_order(model, linear.rpartition(".")[2])
    return tensor if order is None else tensor[order]


def _rope_order(model: Model, projection: str) -> Tensor | None:
    """Rows of q or k so that the two halves of a head, which RoPE turns together, lie side by side; None:
    as they are."""
    heads = {"q_proj": model.geometry.heads, "k_proj": model.geometry.kv_heads}.get(projection)
    if heads is None or not model.architecture.interleaves:
        return None
    size = model.geometry.head_dim
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def _reordered(codes: Quantized, order: Tensor) -> Quantized:
    """A scale of a row, or of a group of its columns, goes with the row."""

    def rows(part: Tensor) -> Tensor:
        # torch gathers no 8-bit floats
        return part.view(torch.uint8)[order].view(part.dtype) if part.itemsize == 1 else part[order]

    zero = codes.zero_point
    return Quantized(rows(codes.codes), rows(codes.scale), None if zero is None else rows(zero))


def _data(stored: Tensor | Quantized, kind: GGMLQuantizationType) -> NDArray[Any]:
    """The bytes of a tensor."""
    if isinstance(stored, Quantized):
        return packed(stored, kind)
    if kind == GGMLQuantizationType.F32:
        stored = stored.float()
    if kind == GGMLQuantizationType.BF16:
        stored = stored.contiguous().view(torch.uint16)
    return np.ascontiguousarray(stored.numpy())


def _add_sizes(writer: GGUFWriter, model: Model) -> None:
    source, geometry = model.checkpoint, model.geometry
    writer.add_name(source.folder.name)
    writer.add_vocab_size(geometry.vocab)
    writer.add_block_count(geometry.layers)
    writer.add_context_length(geometry.max_positions)
    writer.add_embedding_length(geometry.hidden)
    writer.add_feed_forward_length(geometry.intermediate)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.turning)
    writer.add_layer_norm_rms_eps(geometry.norm_eps)
    windows = [window for window in geometry.windows if window is not None]
    if windows:
        writer.add_sliding_window(windows[0])
    m = geometry.multipliers
    if model.architecture.name == "granite":
        writer.add_embedding_scale(m.embedding)
        writer.add_residual_scale(m.residual)
        writer.add_attention_scale(m.attention or geometry.head_dim**-0.5)
        writer.add_logit_scale(m.logits)
    _add_rope(writer, resolved_config(source))


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    """RoPE of the layers that see all positions; Gemma's others have a base of their own."""
    keys = rope_keys(config)
    key = "full_attention" if "full_attention" in keys else keys[0]
    rope = rope_parameters(config, key)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return
    raise SchemeError(
        f"tinier writes no {kind!r} scaling of positions as GGUF. Choose another format: "
        "tinier export --matrix"
    )


def _rope_factors(source: Checkpoint) -> NDArray[np.float32] | None:
    """What Llama 3 divides RoPE's frequencies by."""
    config = resolved_config(source)
    rope = rope_parameters(config, rope_keys(config)[0])
    if rope["rope_type"] != "llama3":
        return None
    found: NDArray[np.float32] = llama3_factors(
        geometry_of(source).head_dim, rope["rope_theta"], rope["factor"], rope["low_freq_factor"],
        rope["high_freq_factor"], rope["original_max_position_embeddings"],
    ).numpy()  # fmt: skip
    return found
