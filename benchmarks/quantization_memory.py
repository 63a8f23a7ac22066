"""Peak memory of quantization against depth: random models of one shape and 4, 16 and 64 layers.

Each run is a process of its own. On a CPU the figure is the process's peak resident memory, without
and with what Python and torch take before any work; on a GPU it is torch's peak allocation.

    python -m benchmarks.quantization_memory --work DIR --out RESULT.json [--device cpu|cuda]
        [--presets int4-gptq int4-best]
    python -m benchmarks.quantization_memory --shape qwen3-30b-a3b --depths 1 2 4 --windows 128
        --length 2048 --presets fp8 int4-gptq --device cuda --work DIR --out RESULT.json

The second draws a shape of benchmarks/architectures.py, and times it too.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.families import geometry_of
from tinier.families.opening import _expected_shapes

_RUN = """
import json, sys, time
from pathlib import Path
from tinier.device import peak_memory_bytes, pick_device
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
folder, out, preset, device, windows, length = sys.argv[1:]
place = pick_device(device)
before = peak_memory_bytes(place)
plan = QuantizePlan(preset=preset, windows=int(windows), length=int(length),
                    iterations=2)
text = [" ".join(str(i * 7 % 1000) for i in range(300000))]
begun = time.monotonic()
made = quantize(open_model(folder), plan, Path(out), text=text, device=device)
print(json.dumps({"before": before, "peak": made.manifest.peak_memory_bytes,
                  "seconds": time.monotonic() - begun}))
"""


def write_random(folder: Path, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def write_shape(folder: Path, shape: str, layers: int) -> None:
    """A bf16 checkpoint of one of architectures.py's shapes, drawn on the GPU, a file a layer."""
    from benchmarks.architectures import SHAPES, drawn

    config = SHAPES[shape] | {"dtype": "bfloat16", "num_hidden_layers": layers}
    checkpoint = Checkpoint(folder, config, {}, None)
    shapes = _expected_shapes(checkpoint, geometry_of(checkpoint))
    torch.manual_seed(0)
    by_file: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        key = parts[2] if name.startswith("model.layers.") else "rest"
        by_file.setdefault(f"model-{key}.safetensors", []).append(name)
    folder.mkdir(parents=True)
    for file, names in by_file.items():
        tensors = {n: drawn(n, shapes[n], shapes, torch.device("cuda")).cpu() for n in names}
        save_file(tensors, folder / file)
    weight_map = {n: file for file, names in by_file.items() for n in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate("0123456789 \n")}, merges=[])
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--presets", nargs="+", default=["int4-gptq", "int4-best"])
    parser.add_argument("--shape", help="of benchmarks/architectures.py, in place of a small Llama")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    model = (
        f"random {arguments.shape}"
        if arguments.shape
        else "random Llama, hidden 1024, intermediate 2816"
    )
    windows = f"{arguments.windows} windows of {arguments.length} tokens"
    result: dict[str, object] = {
        "model": f"{model}, bf16; {windows}",
        "environment": environment(torch.device(arguments.device)),
    }
    for depth in arguments.depths:
        folder = arguments.work / f"depth-{depth}"
        if not folder.exists() and arguments.shape:
            write_shape(folder, arguments.shape, depth)
        elif not folder.exists():
            write_random(folder, depth)
    for preset in arguments.presets:
        peaks = {}
        for depth in arguments.depths:
            out = arguments.work / f"{preset}-{depth}-{arguments.device}"
            command = [sys.executable, "-c", _RUN, str(arguments.work / f"depth-{depth}"), str(out)]
            command += [preset, arguments.device, str(arguments.windows), str(arguments.length)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[depth] = json.loads(done.stdout.splitlines()[-1])
            print(preset, depth, peaks[depth], flush=True)
        figures = [p["peak"] for p in peaks.values()]
        result[preset] = {"by_depth": peaks, "largest_over_smallest": max(figures) / min(figures)}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(preset, f"largest / smallest {max(figures) / min(figures):.3f}", flush=True)


if __name__ == "__main__":
    main()
