"""SmolLM2 off its 4-bit grid (quantization_peers.off_grid), quantized and then trained on that grid:

    python -m benchmarks.grid_training --text valid.txt --books books/ --work WORK --out RESULT.json
        [--model smollm2-135m] [--preset int4-gptq] [--group-size 64] [--weighting fisher]
        [--drift corrected] [--windows 256] [--steps 400] [--batch 32] [--lr 3e-5] [--train all]
        [--generated 0] [--checkpointing none] [--micro-batch 32] [--trained-only] [--on-grid]
        [--device cuda] --name ROW

KL in nats from the 16-bit model, in float32, on text that nothing was calibrated, trained or chosen by: the
32 windows of 512 tokens that benchmarks/quantization_peers.py evaluates, and 16 of the first book. Trained
on: the other windows of `text` but its last 8 and the other books; the step is chosen by those 8.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.quantization_peers import FIRST_EVALUATED, LENGTH, SEQUENCES, off_grid
from torch import Tensor

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import pick_device
from tinier.distillation import DistillPlan, distill
from tinier.engine.decoder import load_decoder
from tinier.evaluation import evaluate_windows, reference_states
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import Document, load_documents, token_windows
from tinier.tokenizer import Tokenizer, load_tokenizer

HELD, BOOK_WINDOWS = 8, 16


class Texts(NamedTuple):
    training: list[Document]
    heldout: list[Document]
    """Decides which step is the best"""
    evaluated: dict[str, Tensor]
    """Windows [n, 512] by kind"""


def texts(tokenizer: Tokenizer, text: str, books: Path) -> Texts:
    own = token_windows(tokenizer, load_documents(text), length=LENGTH)
    first, *others = [path.read_text() for path in sorted(books.glob("*.txt"))]
    end = FIRST_EVALUATED + SEQUENCES

    def written(windows: Tensor) -> list[Document]:
        return [tokenizer.decode(window.tolist()) for window in windows]

    book = token_windows(tokenizer, [first], length=LENGTH, count=BOOK_WINDOWS)
    return Texts(
        training=written(own[:FIRST_EVALUATED]) + written(own[end:-HELD]) + others,
        heldout=written(own[-HELD:]),
        evaluated={"text": own[FIRST_EVALUATED:end], "book": book},
    )


def main() -> None:
    arguments = _arguments()
    device = pick_device(arguments.device)
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = open_model(arguments.model)
    if not arguments.on_grid:
        base = off_grid(base, arguments.work / "moved")
    training, heldout, evaluated = texts(load_tokenizer(base), arguments.text, arguments.books)
    exact = load_decoder(base, device=device, dtype=torch.float32)
    references = {name: reference_states(exact, windows) for name, windows in evaluated.items()}
    quantization = QuantizePlan(
        preset=arguments.preset, group_size=arguments.group_size, windows=arguments.windows,
        length=LENGTH, weighting=arguments.weighting, drift=arguments.drift,
    )  # fmt: skip
    row: dict[str, Any] = {"command": " ".join(sys.argv), "environment": environment(device)}

    def judge(made: Checkpoint) -> dict[str, Any]:
        decoder = load_decoder(made, device=device, dtype=torch.float32)
        found = {n: evaluate_windows(decoder, w, references[n]) for n, w in evaluated.items()}
        return {
            n: {"kl": f.kl, "stderr": f.kl_stderr, "top_1": f.top1_agreement}
            for n, f in found.items()
        }

    out = arguments.work / "made"
    shutil.rmtree(out, ignore_errors=True)
    if not arguments.trained_only:
        started = time.monotonic()
        made = quantize(base, quantization, out, text=training, device=arguments.device)
        row["quantized"] = judge(made) | {"seconds": time.monotonic() - started}
        print(row["quantized"], flush=True)
        shutil.rmtree(out)
    plan = DistillPlan(
        steps=arguments.steps, batch=arguments.batch, micro_batch=arguments.micro_batch, length=LENGTH,
        lr=arguments.lr, min_lr=arguments.min_lr, train=arguments.train, generated=arguments.generated,
        checkpointing=arguments.checkpointing, quantize=quantization, eval_every=arguments.eval_every,
    )  # fmt: skip
    started = time.monotonic()
    made = distill(base, base, plan, out, text=training, heldout=heldout, device=arguments.device)
    assert made.manifest is not None
    row["trained"] = judge(made) | {
        "seconds": time.monotonic() - started,
        "measures": made.manifest.measures,
    }
    print(arguments.name, row["trained"], flush=True)
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    arguments.out.write_text(json.dumps(record | {arguments.name: row}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--preset", default="int4-gptq")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--weighting", default="fisher")
    parser.add_argument("--drift", default="corrected")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-every", type=int)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--min-lr", type=float)
    parser.add_argument("--train", default="all")
    parser.add_argument("--generated", type=int, default=0)
    parser.add_argument("--checkpointing", default=None)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument(
        "--trained-only", action="store_true", help="do not judge what training starts from"
    )
    parser.add_argument("--on-grid", action="store_true", help="leave the weights as they come")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
