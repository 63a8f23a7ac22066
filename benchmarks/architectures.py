"""Decoding speed of other architectures' shapes, random weights made on the GPU, on one GPU.

Tokens/s with 1 and 64 requests in step after a prompt of 384 tokens, and `share` of the limit: the bytes
that a step must read (attention, head, cache, and of a mixture the experts that its tokens chose, counted
in the last step) at the copy bandwidth measured in the same run. FP8 and INT4 (groups of 128) with an FP8
head. Random routers choose about evenly.

    python -m benchmarks.architectures --out RESULT.json [--models qwen3-30b-a3b:bf16 gemma-3-4b:fp8 …]
        [--layers 48] [--profile]
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine_speed import ceilings, decode, kernel_times, requests
from torch import Tensor

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.checkpoint.compressed import quantization_config
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.engine.decoder import Decoder, load_decoder
from tinier.families import HEAD_LINEAR, geometry_of, module_names
from tinier.families.opening import _expected_shapes
from tinier.kernels import grouped
from tinier.schemes import PRESETS, Grid, Layout, Scheme

QWEN3 = {"head_dim": 128, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "vocab_size": 151_936,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3 | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
        "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208, "sliding_window": 1024,
        "query_pre_attn_scalar": 256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
INT4 = Scheme(weights=Grid(kind="int", bits=4, granularity="group", group_size=128))


class RandomCheckpoint(Checkpoint):
    """A checkpoint of a shape whose tensors are drawn when they are read."""

    @contextmanager
    def reader(self, device: str | torch.device = "cpu") -> Iterator[Any]:
        shapes = _expected_shapes(self, geometry_of(self))

        def read(name: str) -> Tensor:
            return drawn(name, shapes[name], shapes, torch.device(device))

        self.tensors.update(dict.fromkeys(shapes))  # type: ignore[arg-type]
        yield read
        self.tensors.clear()


def drawn(
    name: str, shape: tuple[int, ...], shapes: dict[str, Any], device: torch.device
) -> Tensor:
    layer = name.rpartition(".")[0]
    coded = f"{layer}.weight_scale" in shapes
    if name.endswith("norm.weight"):
        return torch.full(shape, 0.5, dtype=torch.bfloat16, device=device)
    if name.endswith("weight_packed"):
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
    if name.endswith("weight_scale"):
        size = 0.02 / (8 if f"{layer}.weight_packed" in shapes else 100)
        return torch.full(shape, size, dtype=torch.bfloat16, device=device)
    if coded:
        return (torch.randn(shape, device=device) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02


def random_decoder(shape: str, form: str, layers: int | None) -> Decoder:
    config = SHAPES[shape] | {"dtype": "bfloat16"}
    if form != "bf16":
        config["tie_word_embeddings"] = False  # a quantized head lies beside the embedding
    if layers is not None:
        config["num_hidden_layers"] = layers
    checkpoint = RandomCheckpoint(Path(shape), config, {}, None)
    geometry = geometry_of(checkpoint)
    if form != "bf16":
        fp8 = PRESETS["fp8"].scheme
        scheme = fp8 if form == "fp8" else INT4
        names = module_names(geometry)
        schemes = {n: scheme for n in names if not n.endswith(f".{geometry.router}")}
        layout = Layout(schemes=schemes | {HEAD_LINEAR: fp8})
        config["quantization_config"] = quantization_config(layout, names)
    torch.manual_seed(0)
    return load_decoder(checkpoint, device=torch.device("cuda"))


def read_bytes(decoder: Decoder, batch: int, context: int, chosen: list[int]) -> float:
    """What one decode step must read. chosen: experts, of each layer."""
    g = decoder.geometry
    total = float(decoder.head.num_bytes)
    for index, layer in enumerate(decoder.layers):
        total += layer.qkv.num_bytes + layer.out.num_bytes
        cached = min(context, g.kinds[index].window or context)
        total += 2 * batch * cached * g.kv_heads * g.head_dim * decoder.cache_dtype.itemsize
        if layer.experts is None:
            assert layer.gate_up is not None
            assert layer.down is not None
            total += layer.gate_up.num_bytes + layer.down.num_bytes
        else:
            each = [*layer.experts.gate_up, *layer.experts.down]
            share = chosen[index] / layer.experts.count
            total += sum(linear.num_bytes for linear in each) * share
            total += layer.experts.router.num_bytes
    return total


class Routed:
    """Keeps what the routers of the captured steps say, by the number of tokens and the layer."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[Tensor]] = {}
        self._route = grouped.route

    def __call__(self, logits: Tensor, *rest: Any, **options: Any) -> grouped.Routing:
        made = self._route(logits, *rest, **options)
        if torch.cuda.is_current_stream_capturing():
            self.blocks.setdefault(made.num_tokens, []).append(made.blocks)
        return made

    def chosen(self, tokens: int, layers: int) -> list[int]:
        """Experts of each layer in the last step of so many tokens."""
        found = self.blocks.get(tokens, [])[:layers]
        return [len({e for e in blocks[:, 0].tolist() if e >= 0}) for blocks in found]


def measure(name: str, bandwidth: float, a: argparse.Namespace) -> dict[str, Any]:
    shape, _, form = name.partition(":")
    routed = Routed()
    grouped.route = routed
    begun = time.perf_counter()
    decoder = random_decoder(shape, form, a.layers)
    config = EngineConfig(
        max_batch_size=64, max_seq_len=1024, max_step_tokens=4096, reuse_prefixes=False,
        kv_cache_bytes=8 << 30,
    )  # fmt: skip
    engine = Engine(decoder, config)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    result: dict[str, Any] = {
        "layers": decoder.geometry.layers, "paths": list(decoder.paths),
        "weight_bytes": decoder.weight_bytes, "first_tokens_seconds": time.perf_counter() - begun,
    }  # fmt: skip
    for batch in (1, 64):
        decode(engine, batch, 384, 8)
        steps = [statistics.median(decode(engine, batch, 384, 128)) for _ in range(a.repeats)]
        step, chosen = statistics.median(steps), routed.chosen(batch, decoder.geometry.layers)
        floor = read_bytes(decoder, batch, 448, chosen) / bandwidth
        result[f"decode-{batch}"] = {
            "tokens_per_second": batch / step, "step_ms": step * 1e3, "share": floor / step,
            "spread": (max(steps) - min(steps)) / step,
            **({"experts_read": statistics.mean(chosen)} if chosen else {}),
        }  # fmt: skip
        if a.profile:
            result[f"profile-{batch}"] = kernel_times(engine, batch, 30)
    if a.requests:
        requests(engine, 64, 64)
        result["requests_per_second"] = requests(engine, 64, 128)
    grouped.route = routed._route
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--requests", action="store_true")
    names = [f"{shape}:{form}" for shape in SHAPES for form in ("bf16", "fp8", "int4")]
    parser.add_argument("--models", nargs="+", default=names)
    a = parser.parse_args()
    limits = ceilings()
    record: dict[str, Any] = {
        "weights": "random", "environment": environment(torch.device("cuda")), "ceilings": limits,
        "models": {},
    }  # fmt: skip
    for name in a.models:
        torch.cuda.empty_cache()
        record["models"][name] = measure(name, limits["copy_bytes_per_second"], a)
        for row, values in record["models"][name].items():
            print(name, row, json.dumps(values), flush=True)
        a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
