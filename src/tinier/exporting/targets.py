"""What each engine reads, from its loader's own rules.

A target has the format of its tensors (`storage`) and rules: each looks at a checkpoint's layout and says
why the engine would not load it, or would compute something else, and what to quantize with instead.
Versions that the rules were read from or seen with: docs/loading.md.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from tinier.checkpoint import Checkpoint, quantization_config
from tinier.checkpoint.modelopt import hf_quant_config
from tinier.errors import SchemeError
from tinier.exporting.gguf_model import gguf_refusal
from tinier.exporting.onnx import onnx_refusal
from tinier.exporting.triton import engine_repository, tensorrt_repository, vllm_repository
from tinier.families import checkpoint_layout, geometry_of, module_names
from tinier.schemes import Layout, Storage

Rule = Callable[[Checkpoint, Layout], str | None]


class Target(NamedTuple):
    storage: Storage | None
    """Format of the tensors; None: in 16 bit"""
    rules: tuple[Rule, ...]
    about: str
    """One line for --help and the matrix"""
    writes: Literal["folder", "gguf", "onnx"] = "folder"
    """A folder of safetensors; llama.cpp's file; a graph that ONNX Runtime's builder makes of the folder"""
    takes_16_bit: bool = True
    """Whether a model that is not quantized can go there"""
    group_size: int | None = None
    """Of its own blocks: what `quantize --for` takes unless told otherwise"""
    files: Callable[[dict[str, Any]], dict[str, str]] = lambda config: {}
    """Text files beside the weights, by name, from the config.json that is written"""
    repository: Callable[[str], dict[str, str]] | None = None
    """Text files of a model repository around the weights, by path, from the model's name"""


def target_config(source: Checkpoint, to: str) -> dict[str, Any]:
    """The config.json of a checkpoint that is exported to one of TARGETS. Raises SchemeError for one that
    the target's loader, or the format of its tensors, cannot take: why, and what would work."""
    reason = _refusal(source, to)
    if reason is not None:
        raise SchemeError(f"{source.folder} cannot go to {to}: {reason}")
    config, layout = dict(source.config), target_layout(source, to)
    config.pop("quantization_config", None)
    if layout is not None:
        config["quantization_config"] = quantization_config(
            layout, module_names(geometry_of(source))
        )
    return config


def target_layout(source: Checkpoint, to: str) -> Layout | None:
    """How the export stores the layers; None: in 16 bit, or as blocks of a GGUF file."""
    layout, storage = checkpoint_layout(source), TARGETS[to].storage
    return None if layout is None or storage is None else replace(layout, storage=storage)


def _refusal(source: Checkpoint, to: str) -> str | None:
    target, layout = TARGETS[to], checkpoint_layout(source)
    if target.writes == "gguf":
        return gguf_refusal(source)
    if layout is None:
        if to == "16bit":
            return "it is in 16 bit already."
        if target.takes_16_bit:
            return None
        return "the model is in 16 bit, and this format is for quantized ones. Quantize it first."
    for rule in target.rules:
        reason = rule(source, layout)
        if reason is not None:
            return reason
    return None


def _no_packed_embedding(source: Checkpoint, layout: Layout) -> str | None:
    scheme = layout.schemes.get("model.embed_tokens")
    if scheme is not None and scheme.weights.bits < 8:
        return "it loads no packed embedding. Use --embedding int8, fp8 or 16bit."
    return None


def _no_embedding(source: Checkpoint, layout: Layout) -> str | None:
    if "model.embed_tokens" in layout.schemes:
        return "it loads no quantized embedding of this kind. Use --embedding 16bit."
    return None


def _no_zero_points(source: Checkpoint, layout: Layout) -> str | None:
    if any(not scheme.weights.symmetric for scheme in layout.schemes.values()):
        return (
            "from 5.23 it cannot load zero points that are packed beside INT4 weights. Quantize without "
            "--asymmetric, or export to vllm, awq."
        )
    return None


def _no_experts(source: Checkpoint, layout: Layout) -> str | None:
    if geometry_of(source).mixture is not None:
        return (
            "quantized experts are not loaded there, or their inputs are left unrounded. Use tinier serve, "
            "or --to 16bit."
        )
    return None


def _no_e5m2(source: Checkpoint, layout: Layout) -> str | None:
    if any(info.dtype == "F8_E5M2" for info in source.tensors.values()):
        return "it reads all 8-bit floats as E4M3, and these are E5M2. Quantize with fp8."
    return None


def _fused_alike(source: Checkpoint, layout: Layout) -> str | None:
    """q, k and v, and gate and up, are one matrix there."""
    geometry = geometry_of(source)
    for index in range(geometry.layers):
        for read in geometry.inputs:
            names = [f"model.layers.{index}.{reader}" for reader in read.readers]
            if len({layout.schemes.get(name) for name in names}) > 1:
                return (
                    f"{', '.join(names)} are one matrix there and are stored in different ways. "
                    "Quantize them alike."
                )
    return None


def _vllm_bits(source: Checkpoint, layout: Layout) -> str | None:
    for name, scheme in layout.schemes.items():
        grid = scheme.weights
        if (grid.kind, grid.bits, scheme.activations) == ("int", 8, None):
            return f"it takes INT8 weights with INT8 inputs ({name} has 16-bit ones). Quantize with int8."
        if grid.kind == "int" and grid.bits in (2, 3):
            return f"no kernel of it that was seen takes INT{grid.bits} ({name}). Quantize with int4-gptq."
    return None


def _int_kv(source: Checkpoint, layout: Layout) -> str | None:
    if layout.kv_cache is not None and layout.kv_cache.kind == "int":
        return "its KV cache takes FP8 and no INT8. Quantize with --kv fp8."
    return None


def _tensorrt_files(config: dict[str, Any]) -> dict[str, str]:
    """What TensorRT-LLM reads first, and how to serve it."""
    files = {"serve.txt": "trtllm-serve . --backend pytorch --extra_llm_api_options options.yaml\n"}
    block = config.get("quantization_config")
    cache = "auto" if block is None or not block.get("kv_cache_quant_algo") else "fp8"
    files["options.yaml"] = f"kv_cache_config:\n  dtype: {cache}\n"
    if block is not None:
        files["hf_quant_config.json"] = json.dumps(hf_quant_config(block), indent=1) + "\n"
    return files


def _gptq_files(config: dict[str, Any]) -> dict[str, str]:
    """What readers before transformers' own looked at."""
    return {"quantize_config.json": json.dumps(config["quantization_config"], indent=1) + "\n"}


def _only_int4(source: Checkpoint, layout: Layout) -> str | None:
    for name, scheme in layout.schemes.items():
        if scheme.weights.bits != 4:
            return f"its products take 4 bits ({name} has {scheme.label}). Quantize with int4-gptq."
    return None


def _onnx(source: Checkpoint, layout: Layout) -> str | None:
    return onnx_refusal(source)


_VLLM = (_no_embedding, _no_e5m2, _fused_alike, _vllm_bits, _int_kv)
_TENSORRT = (_no_embedding, _fused_alike)
TARGETS: dict[str, Target] = {
    "tinier": Target(
        "compressed-tensors", (), "compressed-tensors, whatever the loaders make of it: `tinier import`",
        takes_16_bit=False,
    ),
    "transformers": Target(
        "compressed-tensors", (_no_packed_embedding, _no_zero_points, _no_experts),
        "compressed-tensors, as tinier writes it",
    ),
    "vllm": Target(
        "compressed-tensors", _VLLM, "compressed-tensors; q, k and v alike, gate and up too"
    ),
    "sglang": Target("compressed-tensors", _VLLM, "compressed-tensors, 4 and 8 bits"),
    "tensorrt-llm": Target(
        "modelopt", _TENSORRT,
        "ModelOpt's checkpoint: fp8, fp8-static, fp8-block, nvfp4, INT4 without zero points, FP8 cache",
        files=_tensorrt_files,
    ),
    "triton": Target(
        "compressed-tensors", (), "a model repository of Triton that runs tinier's engine",
        repository=engine_repository,
    ),
    "triton-vllm": Target(
        "compressed-tensors", _VLLM, "a model repository of Triton's vLLM backend",
        repository=vllm_repository,
    ),
    "triton-tensorrt-llm": Target(
        "modelopt", _TENSORRT, "a model repository of TensorRT-LLM's backend for Triton (llmapi)",
        files=_tensorrt_files, repository=tensorrt_repository,
    ),
    "gptq": Target(
        "gptq", (), "GPTQ v1, symmetric integers in groups", takes_16_bit=False, files=_gptq_files
    ),
    "gptq-v2": Target(
        "gptq_v2", (), "GPTQ v2, zeros as they are", takes_16_bit=False, files=_gptq_files
    ),
    "awq": Target("awq", (), "AutoAWQ GEMM, INT4 with or without zero points", takes_16_bit=False),
    "onnx": Target(
        "gptq", (_only_int4, _onnx), "ONNX Runtime GenAI: INT4 without zero points",
        writes="onnx", takes_16_bit=False,
    ),
    "gguf": Target(
        None, (), "llama.cpp's file: Q4_0, Q4_1, Q8_0, MXFP4, NVFP4, BF16, code for code",
        writes="gguf", group_size=32,
    ),
    "ollama": Target(None, (), "that file and a Modelfile", writes="gguf", group_size=32),
    "fp8-hf": Target("fp8", (), "transformers' fine-grained FP8, from fp8-block", takes_16_bit=False),
    "16bit": Target(
        None, (), "numbers instead of codes, to quantize, prune or distil again; inputs are not rounded"
    ),
}  # fmt: skip
