"""Our presets against four peers': same model, same tokens, same measure.

Every row is a process of its own in its own environment; all are judged by benchmarks/peers/measure.py
(transformers, float32, KL against the bf16 base in nats per token). Calibration: the first 32 × 512
tokens of a text; evaluation: 32 × 512 later ones. Rows that the result file has are not made again.
Peers' environments are made once, each with `pip install torch==2.13.0` first:

    python3 -m venv ENVS/llmcompressor   # then llmcompressor==0.14.0.1
    python3 -m venv ENVS/modelopt        # then nvidia-modelopt[hf]==0.47.0
    python3 -m venv ENVS/gptqmodel       # then gptqmodel==7.7.0
    python3 -m venv ENVS/autoround       # then auto-round==0.16.1

    python -m benchmarks.quantization_peers --envs ENVS --text wikitext-2/valid.txt --work DIR
        --out RESULT.json [--model smollm2-135m] [--off-grid] [--rows fp8 int4] [--peers ours llmcompressor]
        [--methods int4-gptq]

The model's weights were a Q4_1 file once, so a 4-bit grid can find them again. --off-grid moves every
one of them by a uniform random amount within half a step of that grid: INT4 figures of a model that
was never quantized.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.families import open_model
from tinier.text import load_documents, token_windows
from tinier.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SEQUENCES, LENGTH, FIRST_EVALUATED = 32, 512, 64


class Row(NamedTuple):
    format: str
    peer: str
    """`ours`, or the peer whose script is benchmarks/peers/PEER_peer.py"""
    method: str
    options: tuple[str, ...] = ()


_BETTER = ("--group-size", "64", "--weighting", "fisher", "--drift", "corrected")
ROWS = (
    Row("FP8 per channel, per token", "llmcompressor", "fp8"),
    Row("FP8 per channel, per token", "ours", "fp8"),
    Row("FP8 per channel, per token", "ours", "fp8-gptq"),
    Row("FP8 static per tensor", "llmcompressor", "fp8-static"),
    Row("FP8 static per tensor", "modelopt", "fp8-static"),
    Row("FP8 static per tensor", "ours", "fp8-static"),
    Row("INT8 SmoothQuant", "llmcompressor", "int8-sq-rtn"),
    Row("INT8 SmoothQuant", "llmcompressor", "int8-sq-gptq"),
    Row("INT8 SmoothQuant", "modelopt", "int8-sq"),
    Row("INT8 SmoothQuant", "ours", "int8-sq"),
    Row("INT4 group 64", "llmcompressor", "int4-rtn"),
    Row("INT4 group 64", "llmcompressor", "int4-gptq"),
    Row("INT4 group 64", "llmcompressor", "int4-awq"),
    Row("INT4 group 64", "modelopt", "int4-awq"),
    Row("INT4 group 64", "gptqmodel", "int4-gptq"),
    Row("INT4 group 64", "gptqmodel", "int4-gptaq"),
    Row("INT4 group 64", "autoround", "int4"),  # 200 steps a layer: a GPU's work
    Row("INT4 group 64", "autoround", "int4-light"),
    Row("INT4 group 64", "ours", "int4", ("--group-size", "64")),
    Row("INT4 group 64", "ours", "int4-awq", ("--group-size", "64")),
    Row("INT4 group 64", "ours", "int4-gptq", ("--group-size", "64")),
    Row("INT4 group 64", "ours", "int4-gptq", _BETTER),
    # its 100 steps a layer take an hour on two cores; these are ten minutes
    Row("INT4 group 64", "ours", "int4-best", ("--group-size", "64", "--iterations", "20")),
    Row("INT4 group 64, zero points", "llmcompressor", "int4-awq-asym"),
    Row("INT3 group 64", "gptqmodel", "int3-gptq"),
    Row("INT3 group 64", "gptqmodel", "int3-gptaq"),
    Row("INT3 group 64", "autoround", "int3"),
    Row("INT3 group 64", "autoround", "int3-light"),
    Row("INT3 group 64", "ours", "int3", _BETTER),
    Row("INT2 group 64", "gptqmodel", "int2-gptq"),
    Row("INT2 group 64", "gptqmodel", "int2-gptaq"),
    Row("INT2 group 64", "autoround", "int2"),
    Row("INT2 group 64", "autoround", "int2-light"),
    Row("INT2 group 64", "ours", "int2", _BETTER),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--off-grid", action="store_true", help="move the weights off their old grid"
    )
    parser.add_argument("--rows", nargs="*", default=[], help="only formats that start like this")
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = open_model(arguments.model)
    if arguments.off_grid:
        base = off_grid(base, arguments.work / "off-grid")
    documents = load_documents(arguments.text)
    windows = token_windows(load_tokenizer(base), documents, length=LENGTH)
    tokens = arguments.work / "tokens.safetensors"
    evaluated = windows[FIRST_EVALUATED : FIRST_EVALUATED + SEQUENCES].contiguous()
    save_file({"calibration": windows[:SEQUENCES].contiguous(), "evaluation": evaluated}, tokens)
    results: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "off_grid": arguments.off_grid,
        "rows": {},
    }
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
        if results.get("off_grid", False) != arguments.off_grid:
            raise SystemExit(f"{arguments.out} is of another base (--off-grid)")
    for row in ROWS:
        options = dict(zip(row.options[::2], row.options[1::2], strict=True))
        method = row.method
        if "--iterations" in options:
            method += f", {options['--iterations']} steps"
        if "--drift" in options:
            method += ", Fisher weights, corrected drift"
        key = " · ".join((row.format, row.peer, method))
        skipped = bool(arguments.rows) and not row.format.startswith(tuple(arguments.rows))
        skipped |= bool(arguments.peers) and row.peer not in arguments.peers
        skipped |= bool(arguments.methods) and row.method not in arguments.methods
        if key in results["rows"] or skipped:
            continue
        print(key, file=sys.stderr, flush=True)
        if row.peer == "ours":
            figures = _ours(row, base.folder, tokens, arguments.text, arguments.work)
        else:
            figures = _theirs(row, base.folder, tokens, arguments.envs)
        results["rows"][key] = figures
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def off_grid(base: Checkpoint, folder: Path) -> Checkpoint:
    """The model with every linear weight of its layers moved within half a step of the Q4_1 grid.

    Such a block of 32 holds its smallest and its largest code, 0 and 15: its step is a fifteenth of
    its range.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base.folder, folder)
    random = torch.Generator().manual_seed(0)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                blocks = weight.float().unflatten(1, (-1, 32))
                step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
                blocks += (torch.rand(blocks.shape, generator=random) - 0.5) * step
                tensors[name] = blocks.flatten(1).to(weight.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return open_model(folder)


def table(results: dict[str, Any]) -> str:
    lines = ["| format | tool | method | perplexity | KL | seconds | CPU seconds |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for key, figures in results["rows"].items():
        form, peer, method = key.split(" · ")
        tool = "**tinier**" if peer == "ours" else f"{peer} {figures['version']}"
        lines.append(
            f"| {form} | {tool} | {method} | {figures['perplexity']:.2f} | {figures['kl']:.4f} | "
            f"{figures['seconds']:.0f} | {figures['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def _theirs(row: Row, base: Path, tokens: Path, envs: Path) -> dict[str, Any]:
    command = [envs / row.peer / "bin" / "python", ROOT / "benchmarks/peers" / f"{row.peer}_peer.py",
               base, tokens, row.method]  # fmt: skip
    return _last_json(command)


def _ours(row: Row, base: Path, tokens: Path, text: str, work: Path) -> dict[str, Any]:
    """Quantize as a user would, with the command; seconds are those of the stage, as peers' are."""
    out = work / row.method
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tinier", "quantize", base, "--preset", row.method,
               "--text", text, "--windows", SEQUENCES, "--length", LENGTH, "--out", out,
               "--json", "--quiet", *row.options]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    made = _last_json(command)
    elapsed = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    measured = _last_json([sys.executable, "-m", "benchmarks.peers.measure", out, base, tokens])
    return measured | {
        "seconds": made["seconds"],
        "command_seconds": elapsed,
        "cpu_seconds": cpu,
        "peak_memory_bytes": made["peak_memory_bytes"],
    }


def _last_json(command: list[object]) -> dict[str, Any]:
    words = [str(word) for word in command]
    # a cold start for AutoRound's compiler, as a first user has it
    with_cache = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"/tmp/inductor-{time.time_ns()}"}
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, env=with_cache
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
