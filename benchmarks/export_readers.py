"""Exports of SmolLM2 as other programs read them: KL in nats from tinier's engine in float32 over 64
tokens.

    python3 -m venv A && A/bin/pip install gptqmodel optimum
    python3 -m venv B && B/bin/pip install optimum-intel openvino nncf accelerate && \
        B/bin/pip install --no-deps gptqmodel==7.7.0    # and what that misses when it is imported
    python -m benchmarks.export_readers --gptqmodel A/bin/python --openvino B/bin/python \
        --work WORK --out RESULT.json

ONNX Runtime is run by tinier itself (the extra `onnx`): on its export, and on what the model builder makes
by its own defaults.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.peers.reader_logits import IDS
from torch import Tensor

from tinier.benchmark import environment
from tinier.engine.decoder import load_decoder
from tinier.exporting import export
from tinier.exporting.onnx import log_probabilities
from tinier.families import geometry_of, open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_calibration

WORKER = Path(__file__).parent / "peers" / "reader_logits.py"
_BUILDER = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]


def compared(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    same = (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float().mean().item()
    kl = (ours.exp() * (ours - theirs)).sum(dim=-1).mean().item()
    return {"kl": kl, "top_1": same, "largest": (ours - theirs).abs().max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gptqmodel", type=Path)
    parser.add_argument("--openvino", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    base, work = open_model("smollm2-135m"), arguments.work
    plan = QuantizePlan(preset="int4-gptq", group_size=64)
    quantize(base, plan, work / "int4", text=load_calibration("builtin"), device="cpu")
    source = open_model(work / "int4")
    decoder = load_decoder(source, device=torch.device("cpu"), dtype=torch.float32)
    ours = decoder.logits_float32(decoder.hidden_states(IDS)[0]).log_softmax(dim=-1)
    rows: dict[str, Any] = {}
    for to in ("gptq", "awq", "onnx"):
        export(source, to, work / to)
    for reader, python in (("gptqmodel", arguments.gptqmodel), ("openvino", arguments.openvino)):
        for to in ("gptq", "awq"):
            if python is None:
                continue
            file = work / f"{reader}-{to}.npy"
            command = [str(python), str(WORKER), reader, str(work / to), str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            rows[f"{to}, {reader}"] = (
                {"refused": done.stderr.strip().splitlines()[-1]}
                if done.returncode
                else compared(ours, torch.from_numpy(np.load(file)))
            )
    theirs = log_probabilities(work / "onnx", geometry_of(source), IDS)
    rows["onnx, ONNX Runtime"] = compared(ours, theirs)
    defaults = [*_BUILDER, "-i", work / "gptq", "-o", work / "defaults", "-c", work / "cache"]
    subprocess.run(defaults, check=True, capture_output=True)
    theirs = log_probabilities(work / "defaults", geometry_of(source), IDS)
    rows["gptq, ONNX Runtime GenAI's builder by its defaults"] = compared(ours, theirs)
    record = {"environment": environment(torch.device("cpu")), "rows": rows}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
