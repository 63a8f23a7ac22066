"""What a stored embedding costs SmolLM2: each part of it alone, and with INT4 layers.

    python -m benchmarks.embedding_quality --work WORK --out RESULT.json

`parts`: nothing else is rounded; KL in nats from the 16-bit model over 16 windows of 512 tokens of the
built-in text, of rows that are looked up, of the head's weight with 16-bit inputs, and of the head with
inputs rounded to 8 bits a token (W8A8, what `--head` does). `whole`: `int4-gptq` in groups of 64,
`tinier eval --against`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.engine.decoder import Decoder, load_decoder
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_calibration, token_windows
from tinier.tokenizer import load_tokenizer

MODEL = "smollm2-135m"
WINDOWS, LENGTH = 16, 512


def log_probabilities(decoder: Decoder, window: Tensor) -> Tensor:
    hidden = decoder.hidden_states(window[None])[0]
    return decoder.logits_float32(hidden).log_softmax(dim=-1)


def parts(base: Checkpoint, kind: Any, work: Path, windows: Tensor) -> dict[str, float]:
    cpu = torch.device("cpu")
    plans = {
        "table": QuantizePlan(preset=None, embedding=kind),
        "head": QuantizePlan(preset=None, head=kind),
    }
    made = {
        name: load_decoder(quantize(base, plan, work / f"{kind}-{name}", device="cpu"), device=cpu)
        for name, plan in plans.items()
    }
    exact, mixed = load_decoder(base, device=cpu), load_decoder(base, device=cpu)
    choices = {
        "looked up": (made["table"].embedding, exact.head),
        "head, 16-bit inputs": (exact.embedding, made["table"].head),
        "head, inputs rounded by token": (exact.embedding, made["head"].head),
        "looked up, and head with 16-bit inputs": (made["table"].embedding, made["table"].head),
    }
    found = dict.fromkeys(choices, 0.0)
    for window in windows:
        log_p = log_probabilities(exact, window)
        for name, (mixed.embedding, mixed.head) in choices.items():
            log_q = log_probabilities(mixed, window)
            found[name] += (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item() / len(windows)
    return found


def evaluated(folder: Path, inputs: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tinier", "eval", str(folder), "--against", MODEL, "--json",
               "--quiet", "--int4-inputs", inputs]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    base, documents = open_model(MODEL), load_calibration("builtin")
    windows = token_windows(load_tokenizer(base), documents, length=LENGTH, count=WINDOWS)
    record: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    record["parts"] = {kind: parts(base, kind, arguments.work, windows) for kind in ("int8", "fp8")}
    record["whole"] = {}
    for kind in ("16bit", "int8"):
        plan = QuantizePlan(preset="int4-gptq", group_size=64, embedding=kind)  # type: ignore[arg-type]
        folder = arguments.work / f"int4-{kind}"
        quantize(base, plan, folder, text=documents, device="cpu")
        for inputs in ("16bit", "int8"):
            record["whole"][f"{kind} embedding, --int4-inputs {inputs}"] = evaluated(folder, inputs)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
