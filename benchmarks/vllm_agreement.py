"""Do checkpoints from tinier load in vLLM unchanged, and does vLLM compute the same model?

Compares log-probabilities of given tokens (greedy text flips at near-ties). vLLM lives in an
environment of its own; this script runs itself there for its half.

    python benchmarks/vllm_agreement.py RUN --vllm-python /path/to/vllm/bin/python --out RESULT.json
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

WINDOWS, LENGTH = 4, 128


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
    parser.add_argument("run", type=Path)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    from tinier.families import open_model
    from tinier.recipe import load_results
    from tinier.text import load_part, token_windows
    from tinier.tokenizer import load_tokenizer

    results = load_results(arguments.run)
    rows = []
    for row in results["variants"]:
        folder = arguments.run / row["checkpoint"]  # the base's path is absolute
        checkpoint = open_model(folder)
        documents = load_part("builtin", "heldout")
        windows = token_windows(
            load_tokenizer(checkpoint), documents, length=LENGTH, count=WINDOWS
        ).tolist()
        done = subprocess.run(
            [arguments.vllm_python, __file__, "--in-vllm", str(folder)],
            input=json.dumps(windows), capture_output=True, text=True, check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        # vLLM's CPU build sometimes aborts while it shuts down, after the answer: the answer counts
        answer = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("[[")), None)
        if answer is None:
            print(done.stderr[-3000:], file=sys.stderr)
            rows.append({"variant": row["name"], "loads": False})
            continue
        theirs = [x for w in json.loads(answer) for x in w]
        ours = [x for w in in_tinier(folder, windows) for x in w]
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            {
                "variant": row["name"],
                "loads": True,
                "tokens": len(ours),
                "perplexity_tinier": round(math.exp(-sum(ours) / len(ours)), 4),
                "perplexity_vllm": round(math.exp(-sum(theirs) / len(theirs)), 4),
                "mean_abs_logprob_difference": round(sum(differences) / len(differences), 5),
                "max_abs_logprob_difference": round(max(differences), 4),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    record = {"command": " ".join(sys.argv), "environment": results["environment"], "rows": rows}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-vllm"]:
        print("\n" + json.dumps(in_vllm(sys.argv[2], json.load(sys.stdin))))
    else:
        main()
