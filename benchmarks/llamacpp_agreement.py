"""How far llama.cpp is from tinier's engine on the GGUF files of `tinier export`: KL of the next token
after 24 prompts of the built-in text, in nats, over llama.cpp's 2,000 likeliest tokens and the rest as
one.

    python3 -m venv ENV && ENV/bin/pip install xllamacpp==2026.10.11549
    python -m benchmarks.llamacpp_agreement --llama-python ENV/bin/python --work WORK --out RESULT.json

`float32`: the same codes computed in float32. `16bit`, `int8`: tinier's engine, `--int4-inputs`. And
`engines`: tinier's from float32, which is what rounding inputs costs there.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.engine.decoder import load_decoder
from tinier.exporting import export
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_calibration, token_windows
from tinier.tokenizer import load_tokenizer

MODELS = ("smollm2-135m", "gemma3-270m")
PLANS = {
    "bf16": None,
    "int8": QuantizePlan(preset="int8", embedding="int8"),
    "int4 g64": QuantizePlan(preset="int4", group_size=64),
    "int4 g64, INT8 embedding": QuantizePlan(preset="int4", group_size=64, embedding="int8"),
    "mxfp4-w4a16": QuantizePlan(preset="mxfp4-w4a16", windows=8),
    "nvfp4-w4a16": QuantizePlan(preset="nvfp4-w4a16", windows=8),
}
WORKER = Path(__file__).parent / "peers" / "llamacpp_next.py"
LIKELIEST = 2000


def told(python: Path, file: Path, model: Checkpoint, prompts: list[list[int]]) -> list[Any]:
    letter = load_tokenizer(model).inner.convert_tokens_to_ids("A")
    command = [str(python), str(WORKER), str(file), str(letter), str(LIKELIEST)]
    done = subprocess.run(
        command, input=json.dumps(prompts), capture_output=True, text=True, check=True
    )
    return list(json.loads(next(x for x in done.stdout.splitlines() if x.startswith("[["))))


def next_tokens(model: Checkpoint, prompts: list[list[int]], **how: Any) -> list[Tensor]:
    """Log-probabilities [vocab] after each prompt."""
    decoder = load_decoder(model, device=torch.device("cpu"), **how)
    found = []
    for prompt in prompts:
        hidden = decoder.hidden_states(torch.tensor([prompt]))[0, -1:]
        found.append(decoder.logits_float32(hidden)[0].log_softmax(dim=-1))
    return found


def from_llama(ours: list[Tensor], theirs: list[Any]) -> float:
    """Mean KL(ours || theirs)."""
    total = 0.0
    for log_p, likely in zip(ours, theirs, strict=True):
        ids, log_q = (torch.tensor(column) for column in zip(*likely, strict=True))
        p, q = log_p[ids].exp(), log_q.exp()
        rest_p, rest_q = ((1 - x.sum()).clamp(min=1e-9) for x in (p, q))
        total += ((p * (log_p[ids] - log_q)).sum() + rest_p * (rest_p / rest_q).log()).item()
    return total / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(torch.device("cpu")), "models": {}}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text())
    for name in MODELS:
        base = open_model(name)
        documents = load_calibration("builtin")
        windows = token_windows(load_tokenizer(base), documents, length=64, count=24)
        prompts = [window[: 5 + 2 * i].tolist() for i, window in enumerate(windows)]
        rows = record["models"].setdefault(name, {})
        for row, plan in PLANS.items():
            if row in rows or (name.startswith("gemma") and "nvfp4" in row):
                continue  # llama.cpp's Gemma 3 has no NVFP4
            folder = arguments.work / name / row.replace(", ", "-").replace(" ", "-")
            model = base
            if plan is not None:
                model = quantize(base, plan, folder, text=documents, device="cpu")
            file = folder.with_name(f"{folder.name}-gguf")
            export(model, "gguf", file)
            theirs = told(arguments.llama_python, file / "model.gguf", model, prompts)
            exact = next_tokens(model, prompts, dtype=torch.float32)
            ours = {how: next_tokens(model, prompts, int4_inputs=how) for how in ("16bit", "int8")}
            rows[row] = {
                "float32": from_llama(exact, theirs),
                **{how: from_llama(found, theirs) for how, found in ours.items()},
                "engines": {
                    how: sum(
                        (x.exp() * (x - y)).sum().item() for x, y in zip(exact, found, strict=True)
                    ) / len(exact)
                    for how, found in ours.items()
                },
            }  # fmt: skip
            print(name, row, rows[row], flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
