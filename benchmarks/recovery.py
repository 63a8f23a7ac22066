"""How much of what pruning or quantization lost does training bring back? SmolLM2-135M-Instruct.

Every row is made by the stages as a user has them: pruned, distilled (or quantized, then trained on its
grid) and measured on text that nothing was trained, calibrated or chosen on: the last windows of
WikiText-2 validation, and the built-in text's held-out part. Recovered: the share of the pruned model's
loss of held-out KL that training removed, 1 - KL after / KL before; and the same of the negative
log-likelihood above the original's. Before: after the cut, not after what is left was refitted.

    python -m benchmarks.recovery --wikitext valid.txt [--prose FOLDER] --work DIR --out RESULT.json
        [--rows depth width …]
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinier import progress
from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import release_memory
from tinier.distillation import DistillPlan, distill
from tinier.engine import load_decoder
from tinier.evaluation import evaluate_windows, reference_states
from tinier.families import geometry_of, open_model
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_documents, load_part, token_windows
from tinier.tokenizer import load_tokenizer

MODEL = "smollm2-135m"
LENGTH, MEASURED = 512, 32
# so small a model needs no activation computed twice
HEAL = DistillPlan(steps=100, batch=64, micro_batch=64, lr=1e-3, min_lr=1e-4, checkpointing="none")
# 25 % of the layers; as few parameters by width; and some of each
PRUNED: dict[str, PrunePlan] = {
    "last": PrunePlan(keep_layers="75%", method="last"),
    "influence": PrunePlan(keep_layers="75%", method="influence"),
    "angular": PrunePlan(keep_layers="75%", method="angular"),
    "loss": PrunePlan(keep_layers="75%", method="loss"),
    "greedy": PrunePlan(keep_layers="75%", method="greedy"),
    "width": PrunePlan(target="109.8M", shrink="width"),
    "both": PrunePlan(keep_layers=27, method="angular", keep_intermediate=1216),
}
# the same, with what is left refitted
REFITTED = [f"{name}+refit" for name in PRUNED]
GRIDS = {"int4-gptq": 64, "int4-best": 64, "nvfp4": None}
QAD = replace(HEAL, lr=1e-4, min_lr=1e-5)


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._work: Path = arguments.work
        self._started = time.monotonic()
        self._out: Path = arguments.out
        self.base = open_model(arguments.model)
        self._sized = {
            "steps": arguments.steps, "batch": arguments.batch,
            "warmup_steps": max(1, arguments.steps // 10), "compile": arguments.compile,
        }  # fmt: skip
        self._device = torch.device(arguments.device)
        wikitext = load_documents(str(arguments.wikitext))
        text = "\n".join(wikitext)
        # the last tenth is measured, the tenth before it tells training when to stop
        cuts = [int(len(text) * share) for share in (0.8, 0.9)]
        self.wikitext, self.heldout = [text[: cuts[0]]], [text[cuts[0] : cuts[1]]]
        self.prose = load_documents(str(arguments.prose)) if arguments.prose else []
        tokenizer = load_tokenizer(self.base)
        self._windows = {
            name: token_windows(tokenizer, documents, length=LENGTH, count=MEASURED)
            for name, documents in (
                ("wikitext", [text[cuts[1] :]]), ("builtin", load_part("builtin", "heldout"))
            )
        }  # fmt: skip
        decoder = load_decoder(self.base, device=self._device)
        self._references = {n: reference_states(decoder, w) for n, w in self._windows.items()}
        del decoder
        self._result: dict[str, Any] = {
            "environment": environment(self._device), "rows": {}
        }  # fmt: skip
        if self._out.exists():
            self._result = json.loads(self._out.read_text())
        self._result["rows"].setdefault("base", self.measure(self.base))

    def measure(self, model: Checkpoint) -> dict[str, Any]:
        decoder = load_decoder(model, device=self._device)
        found: dict[str, Any] = {"parameters": geometry_of(model).parameters}
        for name, windows in self._windows.items():
            quality = evaluate_windows(decoder, windows, self._references[name])
            found[name] = {"perplexity": quality.perplexity, "kl": quality.kl}
        del decoder
        release_memory()
        return found

    def prune(self, name: str) -> Checkpoint:
        out = self._work / name
        if not out.exists():
            plan = replace(PRUNED[_cut(name)], refit=name in REFITTED)
            prune(self.base, plan, out, text=self.wikitext, device=self._device.type)
        made = open_model(out)
        if name not in self._result["rows"]:
            assert made.manifest is not None
            figures = self.measure(made)
            figures |= {k: made.manifest.measures[k] for k in ("dropped_layers", "sizes")}
            self.add(name, figures, made)
        return made

    def heal(
        self, student: Checkpoint, name: str, before: str, plan: DistillPlan, data: str
    ) -> None:
        if name in self._result["rows"]:
            return
        documents = {
            "wikitext": self.wikitext,
            "prose": self.prose,
            "builtin": load_part("builtin", "training"),
            "all": [*self.wikitext, *self.prose],
            "self": [],
            "all+self": [*self.wikitext, *self.prose],
        }[data]
        if data.endswith("self"):
            plan = replace(plan, generated=1024)
        plan = replace(plan, **self._sized)
        started = time.monotonic()
        made = distill(
            student, self.base, plan, self._work / name, text=documents,
            heldout=self.heldout, device=self._device.type,
        )  # fmt: skip
        figures = self.measure(made)
        rows = self._result["rows"]
        for text in self._windows:
            start, end = rows[before][text], figures[text]
            lost = math.log(start["perplexity"] / rows["base"][text]["perplexity"])
            left = math.log(end["perplexity"] / rows["base"][text]["perplexity"])
            end["recovered_kl"] = 1 - end["kl"] / start["kl"]
            end["recovered_loss"] = 1 - left / lost
        figures |= {"data": data, "seconds": time.monotonic() - started}
        self.add(name, figures, made)

    def add(self, name: str, figures: dict[str, Any], made: Checkpoint) -> None:
        assert made.manifest is not None
        for key in ("plan", "heldout_kl", "tokens_per_s"):
            if key in made.manifest.measures:
                figures[key] = made.manifest.measures[key]
        self._result["rows"][name] = figures
        self._out.write_text(json.dumps(self._result, indent=1) + "\n")
        short = {k: v for k, v in figures.items() if k in ("wikitext", "builtin", "seconds")}
        print(
            f"{time.monotonic() - self._started:.0f} s",
            name,
            json.dumps(short),
            figures.get("dropped_layers", ""),
            flush=True,
        )

    def quantized(self, preset: str, lr: float, data: str) -> None:
        plan = QuantizePlan(
            preset=preset, group_size=GRIDS[preset], windows=32, length=LENGTH, iterations=100
        )
        before = f"{preset} g64" if GRIDS[preset] else preset
        if before not in self._result["rows"]:
            out = self._work / preset
            made = quantize(self.base, plan, out, text=self.wikitext, device=self._device.type)
            self.add(before, self.measure(made), made)
        training = replace(QAD, quantize=plan, lr=lr, min_lr=lr / 10)
        self.heal(self.base, f"{before}, trained, lr {lr:g}, {data}", before, training, data)


def _cut(row: str) -> str:
    """The row of the same cut as it is."""
    return row.removesuffix("+refit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=MODEL, help="another file of the same model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder layers")
    parser.add_argument("--pruned", nargs="*", default=[*PRUNED, *REFITTED])
    parser.add_argument("--healed", nargs="*", default=[], help="ROW:DATA:LR[:LOSS[:HIDDEN]]")
    parser.add_argument("--trained", nargs="*", default=[], help="PRESET:LR:DATA")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    progress.enable()
    bench = Bench(arguments)
    for name in arguments.pruned:
        bench.prune(name)
    for row in arguments.healed:
        name, data, lr, *rest = row.split(":")
        plan = replace(HEAL, lr=float(lr), min_lr=float(lr) / 10)
        if rest:
            plan = replace(plan, loss=rest[0])
        if len(rest) > 1:
            plan = replace(plan, hidden_weight=float(rest[1]))
        bench.prune(_cut(name))  # what its gains are counted from
        label = f"{name}, healed, {row.partition(':')[2]}"
        bench.heal(bench.prune(name), label, _cut(name), plan, data)
    for row in arguments.trained:
        preset, lr, data = row.split(":")
        bench.quantized(preset, float(lr), data)


if __name__ == "__main__":
    main()
