"""Mixed precision against one format for all, at equal bits, on SmolLM2 off its 4-bit grid (its weights
were 4-bit once, which flatters such formats: quantization_peers.off_grid).

    python -m benchmarks.mixed_precision --text valid.txt --work WORK --out RESULT.json [--device cuda]
        [--model smollm2-135m] [--peer autoround=ENV/bin/python] [--peer modelopt=ENV/bin/python]
        [--rows NAME ...]

KL in nats from the moved model, in float32, over 32 windows of 512 tokens that neither calibration nor
the search saw. `bits`: of a weight of the layers as stored, scales included. `searched` is the KL that the
search measured on its own windows. Peers are asked for the same bits, in interpreters of their own
(benchmarks/peers/mixed_peers.py).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.quantization_peers import off_grid

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import pick_device
from tinier.engine.decoder import load_decoder
from tinier.evaluation import evaluate_windows, reference_states
from tinier.families import geometry_of, linear_names, open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_documents, token_windows
from tinier.tokenizer import load_tokenizer

PEERS = Path(__file__).parent / "peers/mixed_peers.py"
SEQUENCES, LENGTH, EVALUATED = 64, 512, 32
UNIFORM = {
    "int2 g64": ("int2", 64), "int2 g32": ("int2", 32), "int3 g192": ("int3", 192),
    "int3 g64": ("int3", 64), "int3 g32": ("int3", 32), "int4-gptq g192": ("int4-gptq", 192),
    "int4-gptq g64": ("int4-gptq", 64), "int4-gptq g32": ("int4-gptq", 32),
}  # fmt: skip
BITS = (3.0, 3.5, 4.0, 4.5)
WIDER = ("int2:192", "int2:64", "int3:192", "int3:64", "int3:32", "int4-gptq:192", "int4-gptq:64",
         "int4-gptq:32", "int8-w8a16")  # fmt: skip


def bits_of(model: Checkpoint) -> float:
    names = set(linear_names(geometry_of(model))[:-1])
    stored = sum(
        info.num_bytes for name, info in model.tensors.items()
        if name.rpartition(".")[0] in names and not name.endswith(("bias", "shape"))
    )  # fmt: skip
    geometry = geometry_of(model)
    return 8 * stored / (geometry.layers * sum(r * c for r, c in geometry.linears.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="*", help="only those whose name starts so")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    base = off_grid(open_model(arguments.model), arguments.work / "moved")
    documents = load_documents(arguments.text)
    windows = token_windows(load_tokenizer(base), documents, length=LENGTH)
    evaluated = windows[SEQUENCES : SEQUENCES + EVALUATED]
    exact = load_decoder(base, device=device, dtype=torch.float32)
    reference = reference_states(exact, evaluated)
    common: dict[str, Any] = {"windows": SEQUENCES, "length": LENGTH}
    plans = {
        name: QuantizePlan(preset=preset, group_size=size, **common)
        for name, (preset, size) in UNIFORM.items()
    }
    for bits in BITS:
        plans[f"mixed {bits}"] = QuantizePlan(preset="mixed", bits=bits, **common)
        plans[f"mixed {bits}, with g192"] = QuantizePlan(
            preset="mixed", bits=bits, formats=WIDER, **common
        )
        # as many steps of learned rounding as AutoRound does
        learned = common | {"iterations": 200, "weighting": "none", "drift": "ignored"}
        plans[f"mixed-best {bits}"] = QuantizePlan(preset="mixed-best", bits=bits, **learned)
        plans[f"mixed-best {bits}, with g192"] = QuantizePlan(
            preset="mixed-best", bits=bits, formats=WIDER, **learned
        )
    record: dict[str, Any] = {
        "command": " ".join(sys.argv), "environment": environment(device), "rows": {},
    }  # fmt: skip
    only = tuple(arguments.rows or [""])
    for name, plan in plans.items():
        if not name.startswith(only):
            continue
        folder = arguments.work / name.replace(", ", "-").replace(" ", "-")
        started = time.monotonic()
        made = quantize(base, plan, folder, text=documents, device=str(device))
        seconds = time.monotonic() - started
        found = evaluate_windows(
            load_decoder(made, device=device, dtype=torch.float32), evaluated, reference
        )
        row = {
            "bits": bits_of(made),
            "kl": found.kl,
            "top_1": found.top1_agreement,
            "seconds": seconds,
        }
        if made.manifest is not None and "mixed" in made.manifest.measures:
            mixed = made.manifest.measures["mixed"]
            row |= {"searched": mixed["kl"], "predicted": mixed["predicted"]}
        record["rows"][name] = row
        print(name, row, flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    tokens = arguments.work / "tokens.json"
    tokens.write_text(json.dumps(windows[:SEQUENCES].tolist()))
    for name, python in (peer.split("=", 1) for peer in arguments.peer):
        for bits in BITS:
            if not f"{name} {bits}".startswith(only):
                continue
            found = _peer([python, PEERS, name, base.folder, tokens, str(bits)],
                          arguments.work / f"{name}-{bits}", str(device))  # fmt: skip
            if isinstance(found, dict):
                decoder = load_decoder(
                    open_model(str(arguments.work / f"{name}-{bits}")),
                    device=device,
                    dtype=torch.float32,
                )
                quality = evaluate_windows(decoder, evaluated, reference)
                found |= {"kl": quality.kl, "top_1": quality.top1_agreement}
            record["rows"][f"{name} {bits}"] = found
            print(name, bits, found, flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _peer(command: list[Any], out: Path, device: str) -> dict[str, Any] | str:
    """What a peer printed last, or the end of what it said where it failed."""
    done = subprocess.run(
        [*map(str, command), str(out), device], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr[-1500:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
