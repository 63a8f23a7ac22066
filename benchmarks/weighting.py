"""Fisher weighting of tokens (`--weighting fisher`) and corrected drift (`--drift corrected`), alone and
together, on SmolLM2 off its 4-bit grid (quantization_peers.off_grid), on text of the calibration's kind and
of another kind:

    python -m benchmarks.weighting --text valid.txt --other books/ --work WORK --out RESULT.json
        [--model smollm2-135m] [--presets int4-gptq int3 int4-best] [--ways plain fisher drift both]
        [--iterations 100] [--on-grid] [--device cuda]

Rows that the result file has are not made again. --on-grid: the weights as they come.

KL in nats from the 16-bit model, in float32. Calibration: 64 windows of 512 tokens of `text`; held out: its
next 24, and 16 of `other`.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.quantization_peers import off_grid

from tinier.benchmark import environment
from tinier.device import pick_device
from tinier.engine.decoder import load_decoder
from tinier.evaluation import evaluate_windows, reference_states
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_documents, token_windows
from tinier.tokenizer import load_tokenizer

WINDOWS, LENGTH, HELD, OTHER = 64, 512, 24, 16
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"weighting": "none", "drift": "ignored"},
    "fisher": {"weighting": "fisher", "drift": "ignored"},
    "drift": {"weighting": "none", "drift": "corrected"},
    "both": {"weighting": "fisher", "drift": "corrected"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", default=["int4-gptq", "int3", "int4-best"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--on-grid", action="store_true", help="leave the weights as they come")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = open_model(arguments.model)
    if not arguments.on_grid:
        base = off_grid(base, arguments.work / "moved")
    tokenizer, documents = load_tokenizer(base), load_documents(arguments.text)
    own = token_windows(tokenizer, documents, length=LENGTH)
    other = token_windows(tokenizer, load_documents(arguments.other), length=LENGTH)
    held = {"text": own[WINDOWS : WINDOWS + HELD], "other": other[:OTHER]}
    exact = load_decoder(base, device=device, dtype=torch.float32)
    references = {name: reference_states(exact, windows) for name, windows in held.items()}
    record: dict[str, Any] = {
        "command": " ".join(sys.argv), "environment": environment(device),
        "off_grid": not arguments.on_grid, "rows": {},
    }  # fmt: skip
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        if earlier.get("off_grid", True) == arguments.on_grid:
            raise SystemExit(f"{arguments.out} is of another base (--on-grid)")
        record["rows"] = earlier["rows"]
    for preset in arguments.presets:
        for way in arguments.ways:
            if f"{preset}, {way}" in record["rows"]:
                continue
            folder = arguments.work / "made"
            shutil.rmtree(folder, ignore_errors=True)
            plan = QuantizePlan(
                preset=preset, group_size=64 if preset.startswith("int") else None,
                windows=WINDOWS, length=LENGTH, iterations=arguments.iterations, **WAYS[way],
            )  # fmt: skip
            started = time.monotonic()
            made = quantize(base, plan, folder, text=documents, device=arguments.device)
            row: dict[str, Any] = {"seconds": time.monotonic() - started}
            decoder = load_decoder(made, device=device, dtype=torch.float32)
            for name, windows in held.items():
                found = evaluate_windows(decoder, windows, references[name])
                row[name] = {
                    "kl": found.kl,
                    "stderr": found.kl_stderr,
                    "top_1": found.top1_agreement,
                }
            record["rows"][f"{preset}, {way}"] = row
            print(preset, way, row, flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
