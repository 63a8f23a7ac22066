"""Our presets against llm-compressor, ModelOpt and AutoRound: same model, same tokens, same measure.

Every row is a process of its own in its own environment; all are judged by benchmarks/peers/measure.py
(transformers, float32, KL against the bf16 base in nats per token). Calibration: the first 32 × 512
tokens of a text; evaluation: 32 × 512 later ones. Rows that the result file has are not made again.
Peers' environments are made once, each with `pip install torch==2.13.0` first:

    python3 -m venv ENVS/llmcompressor   # then llmcompressor==0.14.0.1
    python3 -m venv ENVS/modelopt        # then nvidia-modelopt[hf]==0.47.0
    python3 -m venv ENVS/autoround       # then auto-round==0.16.1

    python -m benchmarks.quantization_peers --envs ENVS --text wikitext-2/valid.txt --work DIR
        --out RESULT.json [--rows fp8 int4] [--peers ours llmcompressor]
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
from safetensors.torch import save_file

from tinier.benchmark import environment
from tinier.families import open_model
from tinier.text import load_documents, token_windows
from tinier.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m"
SEQUENCES, LENGTH, FIRST_EVALUATED = 32, 512, 64


class Row(NamedTuple):
    format: str
    peer: str
    """`ours`, or the peer whose script is benchmarks/peers/PEER_peer.py"""
    method: str
    options: tuple[str, ...] = ()


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
    Row("INT4 group 64", "autoround", "int4-light"),
    Row("INT4 group 64", "ours", "int4", ("--group-size", "64")),
    Row("INT4 group 64", "ours", "int4-awq", ("--group-size", "64")),
    Row("INT4 group 64", "ours", "int4-gptq", ("--group-size", "64")),
    # its 100 steps a layer take an hour on two cores; these are ten minutes
    Row("INT4 group 64", "ours", "int4-best", ("--group-size", "64", "--iterations", "20")),
    Row("INT4 group 64, zero points", "llmcompressor", "int4-awq-asym"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=[], help="only formats that start like this")
    parser.add_argument("--peers", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = open_model(MODEL)
    documents = load_documents(arguments.text)
    windows = token_windows(load_tokenizer(base), documents, length=LENGTH)
    tokens = arguments.work / "tokens.safetensors"
    evaluated = windows[FIRST_EVALUATED : FIRST_EVALUATED + SEQUENCES].contiguous()
    save_file({"calibration": windows[:SEQUENCES].contiguous(), "evaluation": evaluated}, tokens)
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "rows": {}}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    for row in ROWS:
        steps = dict(zip(row.options[::2], row.options[1::2], strict=True)).get("--iterations")
        method = f"{row.method}, {steps} steps" if steps else row.method
        key = " · ".join((row.format, row.peer, method))
        skipped = arguments.rows and not any(row.format.startswith(r) for r in arguments.rows)
        if (
            key in results["rows"]
            or skipped
            or (arguments.peers and row.peer not in arguments.peers)
        ):
            continue
        print(key, file=sys.stderr, flush=True)
        if row.peer == "ours":
            figures = _ours(row, base.folder, tokens, arguments.text, arguments.work)
        else:
            figures = _theirs(row, base.folder, tokens, arguments.envs)
        results["rows"][key] = figures
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


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
               "--calibration", text, "--sequences", SEQUENCES, "--length", LENGTH, "--out", out,
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
