"""Time and memory of `tinier export --to gguf` on Llama-3.2-3B's shape, INT4 in groups of 128 with an INT8
embedding, random codes: a process of its own for each run, its peak resident memory with Python and torch.

    python -m benchmarks.export_time --work DIR --out RESULT.json [--to gguf gptq]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.guide_shape import SHAPE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint, PartFiles, pack_linear, quantization_config
from tinier.families import geometry_of, layer_name, linear_shape, module_names
from tinier.numerics import Quantized
from tinier.quantization import QuantizePlan
from tinier.quantization.plan import chosen_presets
from tinier.schemes import Layout, Scheme


def random_codes(shape: tuple[int, int], scheme: Scheme) -> Quantized:
    half = 1 << (scheme.weights.bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8)
    scale = torch.rand(scheme.weights.blocks(shape)) * 0.01 + 1e-3
    return Quantized(codes, scale.bfloat16())


def write_model(folder: Path) -> None:
    """A checkpoint as `tinier quantize --preset int4 --embedding int8` would have made it."""
    folder.mkdir(parents=True)
    config = SHAPE.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    geometry = geometry_of(Checkpoint(folder, config, {}, None))
    presets = chosen_presets(geometry, QuantizePlan(preset="int4", embedding="int8"))
    layout = Layout(schemes={name: preset.scheme for name, preset in presets.items()})
    config["quantization_config"] = quantization_config(layout, module_names(geometry))
    (folder / "config.json").write_text(json.dumps(config))
    parts = PartFiles(folder, geometry.layers + 1)
    ones = torch.ones(geometry.hidden, dtype=torch.bfloat16)
    for index in range(geometry.layers + 1):
        prefix = layer_name(index) if index < geometry.layers else "model.embed_tokens"
        tensors = {}
        for name, scheme in layout.schemes.items():
            if name.startswith(f"{prefix}.") or name == prefix:
                codes = random_codes(linear_shape(geometry, name), scheme)
                packed = pack_linear(codes, scheme)
                tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        for norm in geometry.norms if index < geometry.layers else ():
            tensors[f"{prefix}.{norm}"] = ones
        if index == geometry.layers:
            tensors["model.norm.weight"] = ones
            tensors["lm_head.weight_scale"] = tensors["model.embed_tokens.weight_scale"]
        parts.write(index, tensors, {})
    parts.close()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measured(model: Path, to: str, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tinier", "export", str(model), "--to", to, "--out", str(out)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    begun = time.monotonic()
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": time.monotonic() - begun, "peak_bytes": 1024 * max(before, peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the files go, 4 GB")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--to", nargs="+", default=["gguf"])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.work / "model"
    if not model.exists():
        write_model(model)
    record: dict[str, Any] = {
        "model": "Llama-3.2-3B's shape, INT4 g128, INT8 embedding, random codes",
        "environment": environment(torch.device("cpu")),
    }
    for to in arguments.to:
        out = arguments.work / "export"
        record[to] = [measured(model, to, out) for _ in range(arguments.repeats)]
        print(to, record[to], flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
