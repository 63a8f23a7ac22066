"""Peak memory of quantization against depth: random models of one width and 4, 16 and 64 layers.

Each run is a process of its own. On a CPU the figure is the process's peak resident memory, without
and with what Python and torch take before any work; on a GPU it is torch's peak allocation.

    python -m benchmarks.quantization_memory --work DIR --out RESULT.json [--device cpu|cuda]
        [--presets int4-gptq int4-best]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinier.benchmark import environment

DEPTHS = (4, 16, 64)
_RUN = """
import json, sys
from pathlib import Path
from tinier.device import peak_memory_bytes, pick_device
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
folder, out, preset, device = sys.argv[1:]
place = pick_device(device)
before = peak_memory_bytes(place)
plan = QuantizePlan(preset=preset, group_size=128, sequences=16, length=256, iterations=2)
text = [" ".join(str(i * 7 % 1000) for i in range(20000))]
made = quantize(open_model(folder), plan, Path(out), documents=text, device=device)
print(json.dumps({"before": before, "peak": made.manifest.peak_memory_bytes}))
"""


def write_random(folder: Path, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
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
    arguments = parser.parse_args()
    result: dict[str, object] = {
        "model": "random Llama, hidden 1024, intermediate 2816, bf16; 16 windows of 256 tokens",
        "environment": environment(torch.device(arguments.device)),
    }
    for depth in DEPTHS:
        folder = arguments.work / f"depth-{depth}"
        if not folder.exists():
            write_random(folder, depth)
    for preset in arguments.presets:
        peaks = {}
        for depth in DEPTHS:
            out = arguments.work / f"{preset}-{depth}-{arguments.device}"
            command = [sys.executable, "-c", _RUN, str(arguments.work / f"depth-{depth}"), str(out)]
            done = subprocess.run(
                [*command, preset, arguments.device], check=True, capture_output=True, text=True
            )
            peaks[depth] = json.loads(done.stdout.splitlines()[-1])
            print(preset, depth, peaks[depth], flush=True)
        figures = [p["peak"] for p in peaks.values()]
        result[preset] = {"by_depth": peaks, "largest_over_smallest": max(figures) / min(figures)}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(preset, f"largest / smallest {max(figures) / min(figures):.3f}", flush=True)


if __name__ == "__main__":
    main()
