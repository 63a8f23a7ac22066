"""GGUF files for llama.cpp from a bf16 Llama checkpoint, with the fields of another GGUF file of it.

Start at `write_gguf`. llama.cpp's wheel has no quantizing function, so the blocks come from the
`gguf` package, whose rounding is llama.cpp's own. As llama.cpp's converter does it, vectors are
float32 and the rows of q and k lie in the order of its RoPE.
"""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors.torch import load_file

_FILE_TYPES = {
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_WRITTEN_ANEW = {"general.architecture", "general.file_type"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, fields_of: Path, out: Path, *, matrices: str, head: str) -> None:
    """Matrices in one type, the embedding (which is the head too) in another.

    checkpoint: a folder with one safetensors file and a tied head. fields_of: a GGUF file whose
    metadata and tokenizer are copied.
    """
    reader = GGUFReader(fields_of)
    writer = GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in _WRITTEN_ANEW:
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(_FILE_TYPES[matrices])
    heads = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    for name, stored in load_file(checkpoint / "model.safetensors").items():
        layer, part = _place(name)
        tensor = _rope_order(stored, heads[part]) if part in heads else stored
        type_name = "F32" if tensor.dim() == 1 else head if part == "token_embd" else matrices
        kind = GGMLQuantizationType[type_name]
        writer.add_tensor(f"{layer}{part}.weight", quantize(tensor.float().numpy(), kind),
                          raw_dtype=kind)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_bytes(file: Path) -> int:
    """Of all tensors together."""
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def _place(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.weight` is in `blk.3.` and called `ffn_up`."""
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return "", _NAMES[name]
    _, _, index, part = name.split(".", 3)
    return f"blk.{index}.", _NAMES[part]


def _rope_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head: the two halves that RoPE turns together, side by side instead of apart."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)
