"""The best model within a budget: find it, make it, and say what else there is.

Start at `fit`. It writes a recipe and runs it: every candidate is a variant of the run in `out`, made,
measured and kept as `tinier run` does it. In `out/fit` are what the search measured (`measures-…`), and
what it decided (`rounds-…`, by budget), so that a search that was stopped goes on with the same candidates,
and another budget for the same model costs no more than solving and the new ones.

1. Uniform formats are made and measured, and the base beside them.
2. Times of parts (speed.py), divergences of parts (sensitivity.py).
3. The formats and sizes of least divergence within the limits (costs.py); whole models put together from
   rounded parts decide between solutions (`quantization/mixed.py`).
4. The finalists are made and measured. Limits that a prediction missed are corrected, and solved again.
5. Pruned finalists are healed shortly; what that brings says whether one is worth healing in full.
6. Other points of the front, and the winner trained on its grid, as far as the time goes: shortly first,
   which says what a step takes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tinier.benchmark import environment
from tinier.checkpoint import code_digest, hold, write_atomically
from tinier.device import model_flops, pick_device
from tinier.errors import InputError
from tinier.families import check_length, geometry_of, open_model
from tinier.fitting.budget import AT_LEAST, Budget, Figures, Limits
from tinier.fitting.chains import Effort, name_of, variants_of
from tinier.fitting.choices import default_formats, first_tries, least_bytes, measured_widths
from tinier.fitting.costs import Costs, Design
from tinier.fitting.results import RESULT, SCHEMA, Alternative, Draft, FitResults, Point, Tried
from tinier.fitting.sensitivity import Sensitivity, measure
from tinier.fitting.speed import SpeedTable
from tinier.kernels.machine import machine_of
from tinier.progress import say
from tinier.pruning import PrunePlan, Sizes
from tinier.pruning.plan import possible_sizes
from tinier.quantization.mixed import EMBEDDING_PART, KV_PART, parts_of, search
from tinier.quantization.plan import SIXTEEN_BIT
from tinier.recipe import Recipe, RunResults, check_run_folder, run_recipe
from tinier.recipe.plan import plan_recipe
from tinier.recipe.schema import BASE, Measure, QualityMeasure, SpeedMeasure, Text, Variant
from tinier.schemes import PRESETS
from tinier.text import tensor_sha256, token_windows
from tinier.tokenizer import load_tokenizer

_SHORT_STEPS = 10
_MOST_STEPS = 200
_SPREAD: tuple[tuple[float | None, str], ...] = (
    (0.85, "smaller than the winner"),
    (1.25, "larger than the winner"),
    (None, "the fastest that keeps 90 %"),
    (0.7, "smaller still"),
)
"""Other points of the front: the share of the winner's size, and what they are"""
_FISHER_TIMES = {"cuda": 3.0, "cpu": 7.0}
"""Seconds of GPTQ with Fisher weights and corrected drift, in those of GPTQ alone (docs/log.md)"""
_STEP_FLOPS = 20.0
"""Of a parameter and token: 8 were too few by 2.5 for healing SmolLM2 on two cores"""
# a pruned design whose predicted divergence is so many times the best other one's is not tried
_WORTH_TRYING = 1.1
_GOOD_ENOUGH = 0.995
"""Quality that training would hardly better"""
_OFF = 0.03
"""Of a prediction, before limits are corrected for it"""


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What to search, and with what."""

    model: str
    budget: Budget
    revision: str | None = None
    text: str | Text = "builtin"
    device: str = "auto"
    seed: int = 0
    windows: int = 64
    """Calibration windows."""
    length: int = 512
    """Tokens of each."""
    formats: tuple[str, ...] = ()
    """What a layer may become, PRESET or PRESET:GROUP_SIZE; none given: 2 to 8 bits."""
    prune: bool = True
    """Whether layers and widths may go."""
    train: bool = True
    """Whether candidates may be healed and trained on their grids."""
    lossless: bool = False
    """Measure the candidates as drafts of the model too: the one that makes it fastest is `draft`."""


class Candidate(NamedTuple):
    name: str
    """Of the last of its variants"""
    design: Design
    why: str


def fit(plan: FitPlan, out: Path | str, *, command: str = "") -> FitResults:
    """Search, make and measure; returns what is in out/fit.json: the winner, the front, the alternatives.

    Raises the InputError of whatever is wrong before any work, OutputError for a folder in use.
    """
    out = Path(out)
    check_run_folder(out)
    search_ = _Search(plan, out, command)
    (out / "fit").mkdir(parents=True, exist_ok=True)
    with hold(out / "fit", out / "fit" / ".lock"):
        return search_.run()


def describe(plan: FitPlan, out: Path) -> dict[str, Any]:
    """What `fit` would do and about how long it would take, after every check."""
    check_run_folder(out)
    return _Search(plan, out, "").expected()


class _Search:
    """One search on its way."""

    def __init__(self, plan: FitPlan, out: Path, command: str) -> None:
        if not plan.budget.limits_anything:
            raise InputError(
                "there is no budget. Give at least one of --max-size, --max-memory, --min-throughput, "
                "--max-latency and --min-quality."
            )
        self._plan, self._out, self._command = plan, out, command
        self._source = open_model(plan.model, plan.revision)
        self._geometry = geometry_of(self._source)
        if self._geometry.mixture is not None:
            raise InputError(
                "fit does not search mixtures of experts yet. Use tinier run with variants of your own."
            )
        load = plan.budget.load
        check_length(self._source, load.input_length + load.output_length)
        self._device = pick_device(plan.device)
        self._formats = default_formats(plan.formats, self._geometry, self._device)
        self._effort = _effort(plan, self._device)
        self._check_least()
        planned = plan_recipe(self._recipe(self._uniform()))
        self._windows = token_windows(
            load_tokenizer(self._source),
            planned.parts.calibration,
            length=plan.length,
            count=plan.windows,
        )
        said = [asdict(plan) | {"model": self._source.hash}, code_digest("tinier.fitting.driver")]
        key = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]
        self._decided_path = out / "fit" / f"rounds-{key}.json"
        self._candidates: list[Candidate] = []
        self._rounds: dict[str, list[str]] = {}
        self._spent = 0.0
        self._per_variant = 60.0
        self._named_before: set[str] = set()

    def _check_least(self) -> None:
        """Raise InputError for bytes that no model would keep."""
        budget, align = self._plan.budget, self._effort.align if self._plan.prune else None
        least = least_bytes(self._geometry, self._formats, align)
        asked = {"--max-size": budget.max_size, "--max-memory": budget.max_memory}
        for option, amount in asked.items():
            if amount is None or (amount.relative and option == "--max-memory"):
                continue  # the base's memory is not known yet
            allowed = amount.of(self._source.disk_bytes)
            if allowed < least:
                raise InputError(
                    f"{option} {allowed / 1e6:.3g}MB cannot be kept: the smallest model that fit could "
                    f"choose has over {least / 1e6:.3g}MB. Allow more"
                    + (", or give narrower --formats, such as int2." if self._plan.formats else ".")
                )

    # --- the whole

    def run(self) -> FitResults:
        self._recall()
        self._started = time.monotonic() - self._spent
        for line in self.expected()["lines"]:
            say(f"fit: {line}")
        results = self._round("uniform", self._uniform)
        costs, known = self._costs(results)

        def limits() -> Limits:
            # the base is measured again beside each variant: what is relative to it moves along
            costs.measured_base(_figures(results, BASE))
            return self._plan.budget.limits(_figures(results, BASE))

        results = self._round("first", lambda: self._first(costs, known, limits()))
        results = self._round("corrected", lambda: self._corrected(costs, known, limits(), results))
        self._learn_recovery(costs, results)
        results = self._round("healed", lambda: self._healed(costs, limits(), results))
        results = self._round("rounded", lambda: self._rounded(limits(), results))
        for number, (part, why) in enumerate(_SPREAD):
            decide = partial(self._spread, part, why, costs, limits(), results)
            results = self._round(f"spread {number + 1}", decide)
        results = self._round("trained", lambda: self._trained(limits(), results))
        results = self._round("longer", lambda: self._trained_longer(limits(), results))
        if self._plan.lossless:
            say("fit: drafts: what each candidate gains as the model's draft")
            recipe = self._recipe(self._candidates, drafts=True)
            results = run_recipe(recipe, self._out, command=self._command, named=self._named_before)
            self._keep()
        found = self._conclude(costs, limits(), results)
        write_atomically(self._out / RESULT, json.dumps(found.to_json(), indent=1) + "\n")
        write_atomically(self._out / "front.csv", found.front_csv())
        return found

    def expected(self) -> dict[str, Any]:
        """What the search will do, in words, and about how long each step takes."""
        budget = self._plan.budget
        flops = model_flops(self._device)
        tokens = self._windows.numel()
        linear = 2.0 * self._geometry.layers * self._geometry.layer_parameters
        rounding = len(self._formats) * (
            3 * linear * tokens / flops + self._source.weight_bytes / 2e8
        )
        # of each part in about five formats: half of the layers on average, and the head in float32
        streams = 5 * len(parts_of(self._geometry))
        head = 2 * 2.0 * self._geometry.vocab * self._geometry.hidden
        parts = streams * (linear / 2 + head) * 1024 / flops
        lines = [
            f"at most {budget.seconds / 60:.0f} minutes, under {budget.load.input_length} tokens in, "
            f"{budget.load.output_length} out, {budget.load.concurrency} at once, on {self._device}",
            f"{len(self._formats)} formats ({', '.join(self._formats)}), 16 bit; embedding, KV cache"
            + ("; layers and widths" if self._plan.prune else ""),
            f"about {rounding / 60:.1f} minutes to round all parts, {parts / 60:.1f} to measure each alone;"
            " then candidates, each made and measured, and training, until the time is spent",
        ]
        if rounding + parts > budget.seconds and not any((self._out / "fit").glob("measures-*")):
            lines.append(
                "that is more than --time: it will be overrun, and no more than the first candidates made. "
                f"Give --time {3 * (rounding + parts) / 60:.0f}m, or fewer --formats"
            )
        return {
            "lines": lines, "rounding_seconds": rounding, "parts_seconds": parts, "seconds": budget.seconds,
            "uniform": [candidate.name for candidate in self._uniform()], "formats": list(self._formats),
        }  # fmt: skip

    # --- rounds

    def _round(self, name: str, decide: Callable[[], Sequence[Candidate]]) -> RunResults:
        """Decide on candidates, once; make and measure them. Returns the results of the whole run."""
        if name not in self._rounds:
            new = [c for c in decide() if c.name not in {known.name for known in self._candidates}]
            self._candidates += new
            self._rounds[name] = [candidate.name for candidate in new]
            self._keep()
        before = time.monotonic()
        fresh = [n for n in self._rounds[name] if not (self._out / "variants" / n).exists()]
        for candidate in self._candidates:
            if candidate.name in self._rounds[name]:
                say(f"fit: {name}: {candidate.name}: {candidate.why}")
        recipe = self._recipe(self._candidates)
        results = run_recipe(recipe, self._out, command=self._command, named=self._named_before)
        self._named_before = set(recipe.variants)
        if fresh:
            self._per_variant = (time.monotonic() - before) / len(fresh)
        self._keep()
        return results

    def _keep(self) -> None:
        self._spent = time.monotonic() - self._started
        values = {
            "budget": self._plan.budget.as_json(),
            "spent": self._spent,
            "per_variant": self._per_variant,
            "rounds": self._rounds,
            "candidates": [
                {"name": c.name, "design": c.design.as_json(), "why": c.why}
                for c in self._candidates
            ],
        }
        write_atomically(self._decided_path, json.dumps(values, indent=1) + "\n")

    def _recall(self) -> None:
        """Candidates of this budget's earlier call, and of other budgets in the same folder."""
        known: dict[str, Candidate] = {}
        for path in sorted(
            (self._out / "fit").glob("rounds-*.json"), key=lambda p: p.stat().st_mtime
        ):
            values = json.loads(path.read_text("utf-8"))
            # an older tinier's search has none
            self._per_variant = values.get("per_variant", self._per_variant)
            for value in values["candidates"]:
                design = Design.from_json(value["design"])
                known[value["name"]] = Candidate(value["name"], design, value["why"])
            if path == self._decided_path:
                self._rounds, self._spent = values["rounds"], values["spent"]
        self._candidates = list(known.values())

    def _left(self) -> float:
        return self._plan.budget.seconds - (time.monotonic() - self._started)

    def _recipe(self, candidates: Sequence[Candidate], *, drafts: bool = False) -> Recipe:
        variants: dict[str, Variant] = {}
        for candidate in candidates:
            variants |= variants_of(candidate.design, candidate.name, self._geometry, self._effort)
        plan, load = self._plan, self._plan.budget.load
        return Recipe(
            base=plan.model, revision=plan.revision, seed=plan.seed, device=plan.device, text=plan.text,
            variants=variants,
            measure=Measure(
                quality=QualityMeasure(windows=32, length=min(512, plan.length)),
                speed=SpeedMeasure(
                    concurrency=(load.concurrency,), input_length=load.input_length,
                    output_length=load.output_length,
                ),
                draft=drafts,
            ),
        )  # fmt: skip

    def _named(self, design: Design, why: str, costs: Costs | None = None) -> Candidate:
        """A candidate with a name that no other design has."""
        whole = Sizes.of(self._geometry)
        for known in self._candidates:
            if known.design == design:
                return known
        bits = 0.0
        if costs is not None:
            side = self._source.disk_bytes - self._source.weight_bytes
            bits = 8 * (costs.predicted(design).size - side) / self._geometry.parameters
        name = name_of(design, whole, bits)
        taken = {known.name for known in self._candidates}
        number = 2
        while name in taken:
            name = f"{name_of(design, whole, bits)}.{number}"
            number += 1
        return Candidate(name, design, why)

    # --- what is measured

    def _costs(self, results: RunResults) -> tuple[Costs, Sensitivity]:
        plan, source = self._plan, self._source
        said = [source.hash, tensor_sha256(self._windows), list(self._formats), plan.prune,
                code_digest("tinier.quantization.mixed", "tinier.pruning.choice")]  # fmt: skip
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        known = measure(
            source, self._formats, self._windows, self._out / "fit" / f"measures-{key}", self._device,
            align=self._effort.align if plan.prune else None,
        )  # fmt: skip
        whole = Sizes.of(self._geometry)
        possible = [whole]
        if plan.prune:
            possible = list(
                possible_sizes(self._geometry, PrunePlan(target="1B", align=self._effort.align))
            )
        align = self._effort.align
        widths = measured_widths(self._geometry, self._formats, align) if plan.prune else [whole]
        load = plan.budget.load
        machine = environment(self._device)
        said = [source.config, asdict(load), list(self._formats), machine.get("gpu"), machine["cpu"],
                machine["torch_threads"], code_digest("tinier.benchmark.speed")]  # fmt: skip
        key = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]
        say("fit: measures how long parts take")
        table = SpeedTable.measure(
            source, self._formats, widths, load,
            self._out / "fit" / f"speed-{key}.json", self._device, "int8",
        )  # fmt: skip
        memory = results.base.memory
        costs = Costs(
            source=source, formats=self._formats, divergence=known.divergence, cuts=known.cuts,
            dropped=known.dropped, table=table, machine=machine_of(self._device), load=load,
            possible=possible, base=_figures(results, BASE),
            base_weights=memory.weights_bytes + memory.kv_bytes,
        )  # fmt: skip
        return costs, known

    # --- what is decided

    def _uniform(self) -> list[Candidate]:
        """One format for all, the embedding in 8 bits: what a person would try first."""
        names = [part.name for part in parts_of(self._geometry)]
        ends = {EMBEDDING_PART: "int8", KV_PART: SIXTEEN_BIT}
        found = []
        for label in first_tries(self._formats):
            design = Design(Sizes.of(self._geometry), (), dict.fromkeys(names, label) | ends)
            found.append(Candidate(label.replace(":", "-g"), design, "one format for all"))
        return found

    @property
    def _objective(self) -> str:
        """Least divergence within the limits; where only quality is limited, least size and time."""
        b = self._plan.budget
        limited = (b.max_size, b.max_memory, b.min_throughput, b.max_latency)
        return "divergence" if any(limit is not None for limit in limited) else "both"

    def _solvable(self, limits: Limits) -> Limits:
        """The limits that the solver keeps: quality is what it betters where anything else is limited."""
        return replace(limits, quality=None) if self._objective == "divergence" else limits

    def _first(self, costs: Costs, known: Sensitivity, limits: Limits) -> list[Candidate]:
        found = []
        solved = costs.solve(self._solvable(limits), self._objective, pruned=False)
        if solved is not None:
            best = self._searched(costs, known, solved, limits)
            found.append(self._named(best, "least divergence within the budget", costs))
        if not self._plan.prune:
            return found
        pruned = costs.solve(self._solvable(limits), self._objective, pruned=True)
        if pruned is None:
            return found
        # compared before whole models were tried, which only some formats of all layers are
        if solved is not None and costs.lost(pruned) > _WORTH_TRYING * costs.lost(solved):
            say("fit: no pruned model is predicted to come near the best that is only quantized")
            return found
        steps = _SHORT_STEPS if self._plan.train else 0
        pruned = replace(pruned, steps=steps)
        return [*found, self._named(pruned, "the best with fewer layers or widths", costs)]

    def _searched(self, costs: Costs, known: Sensitivity, best: Design, limits: Limits) -> Design:
        """The formats whose whole diverges least, of those that solutions suggest."""
        if self._objective != "divergence":
            return best
        limited = costs.limited(best.sizes, self._solvable(limits))
        assert limited is not None
        found = search(
            known.rounded, costs.options(best.sizes), limited, known.windows, self._plan.seed
        )
        return replace(best, formats=found.formats)

    def _corrected(
        self, costs: Costs, known: Sensitivity, limits: Limits, results: RunResults
    ) -> list[Candidate]:
        """Solved again, with the limits moved by what the predictions were off."""
        found = []
        for candidate in self._of_round("first"):
            measured = _figures_or_none(results, candidate.name)
            if measured is None:
                continue
            predicted = costs.predicted(candidate.design)
            moved, off = limits, False
            for name in ("size", "memory", "throughput", "latency"):
                limit = getattr(limits, name)
                ratio = getattr(predicted, name) / getattr(measured, name)
                is_off = abs(ratio - 1) > _OFF or name in limits.broken(measured)
                if limit is not None and is_off:
                    moved, off = replace(moved, **{name: limit * ratio}), True
            if not off:
                continue
            is_pruned = candidate.design.sizes != Sizes.of(self._geometry)
            again = costs.solve(self._solvable(moved), self._objective, pruned=is_pruned)
            if again is None:
                continue
            if is_pruned:
                again = replace(again, steps=candidate.design.steps)
            else:
                again = self._searched(costs, known, again, moved)
            found.append(
                self._named(again, "the same, corrected for what predictions were off", costs)
            )
        return found

    def _learn_recovery(self, costs: Costs, results: RunResults) -> None:
        """What healing left of a cut's divergence, from the candidates that were healed."""
        for candidate in self._candidates:
            design = candidate.design
            if costs.cuts is None or not design.steps or design.grid_steps:
                continue
            measured = _figures_or_none(results, candidate.name)
            if measured is None or measured.quality <= 0:
                continue
            lost = -_log(measured.quality)
            rounding = costs.lost(design) - costs.healed * costs.cuts(design.sizes)
            costs.recovered(max(0.05, (lost - rounding) / costs.cuts(design.sizes)))

    def _healed(self, costs: Costs, limits: Limits, results: RunResults) -> list[Candidate]:
        """The best pruned candidate, healed for longer, where it may win."""
        if not (self._plan.prune and self._plan.train):
            return []
        pruned = [c for c in self._candidates if c.design.steps]
        measured = {c.name: _figures_or_none(results, c.name) for c in pruned}
        pruned = [c for c in pruned if measured[c.name] is not None]
        if not pruned:
            return []
        best = max(pruned, key=lambda c: measured[c.name].quality)  # type: ignore[union-attr]
        others = [c.name for c in self._candidates if c not in pruned]
        kept = [
            f for n in others if (f := _figures_or_none(results, n)) and not _resources(limits, f)
        ]
        bar = max((f.quality for f in kept), default=0.0)
        own = measured[best.name]
        assert own is not None
        # a guess, not measured: healing in full takes a quarter off the divergence that a short one leaves
        if own.quality**0.75 < bar:
            say(f"fit: {best.name} is not healed further: {own.quality:.3f} against {bar:.3f}")
            return []
        steps = self._steps(best, 0.6)
        if steps <= best.design.steps:
            return []
        return [
            self._named(
                replace(best.design, steps=steps), "the best of those, healed in full", costs
            )
        ]

    def _steps(self, candidate: Candidate, share: float) -> int:
        """Training steps that a share of the time that is left is enough for: as a training of this
        candidate was measured, else as its arithmetic says."""
        tokens = self._effort.batch * self._effort.training_length
        # forward and backward, the teacher's forward, and on the grid the rounding of every weight
        a_step = _STEP_FLOPS * self._geometry.parameters * tokens / model_flops(self._device)
        around = 0.0  # to load, to look at the held-out text, to write
        for manifest in self._manifests(candidate):
            rate = manifest["measures"].get("tokens_per_s")
            if manifest["stage"] == "distill" and rate is not None:
                a_step = tokens / rate
                steps = manifest["measures"]["plan"]["steps"]
                around = max(0.0, manifest["seconds"] - steps * a_step)
        return int(min(_MOST_STEPS, (share * self._left() - around) / a_step))

    def _manifests(self, candidate: Candidate) -> list[dict[str, Any]]:
        names = variants_of(candidate.design, candidate.name, self._geometry, self._effort)
        paths = [self._out / "variants" / name / "tinier.json" for name in names]
        return [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]

    def _spread(
        self, part: float | None, why: str, costs: Costs, limits: Limits, results: RunResults
    ) -> list[Candidate]:
        """Another point of the front, if there is time for one as long as the last took."""
        share = 0.5 if self._plan.train else 0.9
        if self._per_variant > share * self._left():
            return []
        winner = self._best(limits, results)
        size = _figures(results, winner or BASE).size * (1.0 if winner else 0.4)
        if part is None:
            design = costs.solve(Limits(quality=0.9), "milliseconds", pruned=False)
        else:
            design = costs.solve(Limits(size=part * size), "divergence", pruned=False)
        return [] if design is None else [self._named(design, why, costs)]

    def _to_better(self, limits: Limits, results: RunResults) -> Candidate | None:
        """The winner, unless it was trained on its grid or hardly anything is lost."""
        winner = self._best(limits, results)
        if winner is None or _figures(results, winner).quality > _GOOD_ENOUGH:
            return None
        (candidate,) = [c for c in self._candidates if c.name == winner]
        return None if candidate.design.grid_steps else candidate

    def _rounded(self, limits: Limits, results: RunResults) -> list[Candidate]:
        """The winner rounded with tokens weighted and drift corrected, where there is time."""
        candidate = self._to_better(limits, results)
        if candidate is None or candidate.design.fisher:
            return []
        names = {label.partition(":")[0] for label in candidate.design.formats.values()}
        if all(PRESETS[name].algorithm.rounding != "gptq" for name in names & PRESETS.keys()):
            return []
        plain = sum(
            made["seconds"] for made in self._manifests(candidate) if made["stage"] == "quantize"
        )
        if _FISHER_TIMES[self._device.type] * plain > 0.5 * self._left():
            return []
        design = replace(candidate.design, fisher=True)
        why = "the winner, tokens weighted and drift corrected as it is rounded"
        return [Candidate(f"{candidate.name}-fisher", design, why)]

    def _trained(self, limits: Limits, results: RunResults) -> list[Candidate]:
        """The winner trained on its grid, where there is time and something to better."""
        candidate = self._to_better(limits, results)
        if candidate is None or not self._plan.train:
            return []
        if self._steps(candidate, 0.7) < _SHORT_STEPS:
            return []
        return [_on_its_grid(candidate, candidate.name, _SHORT_STEPS)]

    def _trained_longer(self, limits: Limits, results: RunResults) -> list[Candidate]:
        """The same for as many steps as there is time for, where the short training was worth it."""
        winner = self._best(limits, results)
        short = [
            c for c in self._candidates if c.name == winner and c.design.grid_steps == _SHORT_STEPS
        ]
        if not short or (steps := self._steps(short[0], 0.8)) <= 2 * _SHORT_STEPS:
            return []
        name = short[0].name.removesuffix(f"-trained{_SHORT_STEPS}")
        return [_on_its_grid(short[0], name, steps)]

    def _of_round(self, name: str) -> list[Candidate]:
        return [c for c in self._candidates if c.name in self._rounds.get(name, ())]

    # --- what is found

    def _best(self, limits: Limits, results: RunResults) -> str | None:
        """The name of the measured candidate that keeps all limits and is best."""
        made = {c.name: _figures_or_none(results, c.name) for c in self._candidates}
        kept = {n: f for n, f in made.items() if f is not None and not limits.broken(f)}
        if not kept:
            return None
        base = _figures(results, BASE)

        def worth(figures: Figures) -> float:
            if self._objective == "divergence":
                return figures.quality
            return figures.throughput / base.throughput * base.size / figures.size

        return max(kept, key=lambda n: worth(kept[n]))

    def _conclude(self, costs: Costs, limits: Limits, results: RunResults) -> FitResults:
        rows = {row.name: _figures(results, row.name) for row in results.variants}
        winner = self._best(limits, results)
        off: dict[str, list[float]] = {}
        for candidate in self._candidates:
            if candidate.name in rows and not (
                candidate.design.grid_steps or candidate.design.fisher
            ):
                predicted = costs.predicted(candidate.design)
                for name, value in asdict(rows[candidate.name]).items():
                    off.setdefault(name, []).append(
                        getattr(predicted, name) / value - 1 if value else 0.0
                    )
        return FitResults(
            schema=SCHEMA,
            command=self._command,
            model=self._plan.model,
            budget=self._plan.budget.as_json(),
            limits=limits,
            base=rows[BASE],
            winner=winner,
            winner_figures=rows[winner] if winner else None,
            nearest=None if winner else self._nearest(costs, limits),
            alternatives=self._alternatives(costs, limits, rows[winner], winner) if winner else (),
            front=self._front(costs, rows),
            candidates={
                c.name: Tried(why=c.why, design=c.design.as_json()) for c in self._candidates
            },
            prediction_errors={name: tuple(values) for name, values in off.items()},
            seconds=round(self._spent, 1),
            draft=self._draft(results) if self._plan.lossless else None,
        )

    def _draft(self, results: RunResults) -> Draft | None:
        """The best of those that were measured as drafts; None: no candidate was made."""
        found = [
            Draft(name=row.name, gain=row.draft.gain, greedy=row.draft.greedy)
            for row in results.variants
            if row.draft is not None
        ]
        return max(found, key=lambda draft: draft.gain, default=None)

    def _nearest(self, costs: Costs, limits: Limits) -> dict[str, float | None]:
        """For each limit what it would have to be, the others kept, as predicted; None: nothing helps."""
        kinds = {"size": "size", "memory": "memory", "throughput": "milliseconds", "latency": "step",
                 "quality": "divergence"}  # fmt: skip
        found: dict[str, float | None] = {}
        for name, limit in asdict(limits).items():
            if limit is not None:
                design = costs.solve(replace(limits, **{name: None}), kinds[name])
                found[name] = None if design is None else getattr(costs.predicted(design), name)
        return found

    def _alternatives(
        self, costs: Costs, limits: Limits, figures: Figures, winner: str
    ) -> tuple[Alternative, ...]:
        """What the next cheaper and the next better choice would cost, as predicted."""
        found = []
        (design,) = [c.design for c in self._candidates if c.name == winner]
        plain = costs.predicted(replace(design, steps=0, grid_steps=0))
        # what predictions are off for the winner, they are off for its neighbours
        scale = {n: getattr(figures, n) / v for n, v in asdict(plain).items()}
        lost = _log(figures.quality) / min(-1e-9, _log(plain.quality))
        wanted: list[tuple[Literal["smaller", "faster", "better"], Design | None]] = [
            ("smaller", costs.solve(Limits(size=0.9 * plain.size)))
        ]
        if limits.throughput is not None or limits.latency is not None:
            wanted.append(("faster", costs.solve(Limits(throughput=1.1 * plain.throughput))))
        wanted.append(("better", costs.solve(Limits(quality=plain.quality**0.7), "size")))
        for what, other in wanted:
            if other is None:
                continue
            values = costs.predicted(other)
            scaled = {n: v * scale[n] for n, v in asdict(values).items()}
            scaled["quality"] = values.quality**lost
            found.append(Alternative(what=what, **scaled))
        return tuple(found)

    def _front(self, costs: Costs, rows: dict[str, Figures]) -> tuple[Point, ...]:
        """What was measured and is beaten by nothing in everything, and what is predicted between."""
        found = [
            Point(kind="measured", name=name, **asdict(figures))
            for name, figures in rows.items()
            if not any(_beats(other, figures) for other in rows.values())
        ]
        base = rows[BASE].size
        for percent in range(20, 65, 5):
            design = costs.solve(Limits(size=base * percent / 100), pruned=False)
            if design is not None:
                predicted = asdict(costs.predicted(design))
                found.append(Point(kind="predicted", name=f"{percent}% of the size", **predicted))
        return tuple(found)


def _on_its_grid(candidate: Candidate, name: str, steps: int) -> Candidate:
    design = replace(candidate.design, grid_steps=steps)
    return Candidate(f"{name}-trained{steps}", design, "the winner, trained on its grid")


def _log(quality: float) -> float:
    return math.log(max(quality, 1e-9))


def _resources(limits: Limits, found: Figures) -> list[str]:
    return replace(limits, quality=None).broken(found)


def _beats(one: Figures, other: Figures) -> bool:
    """Whether one is as good in every figure, and better in some."""
    theirs = asdict(other)
    pairs = [
        (a, theirs[name]) if name in AT_LEAST else (-a, -theirs[name])
        for name, a in asdict(one).items()
    ]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _figures(results: RunResults, name: str) -> Figures:
    found = _figures_or_none(results, name)
    assert found is not None
    return found


def _figures_or_none(results: RunResults, name: str) -> Figures | None:
    """None for a variant that failed."""
    row = results.variant(name)
    if row is None:
        return None
    return Figures(
        size=float(row.disk_bytes),
        memory=float(row.memory.peak_bytes),
        throughput=results.base.speed[-1].output_tokens_per_s.median * row.speedup,
        latency=row.speed[-1].itl_ms.median,
        quality=row.retained_quality,
    )


def _effort(plan: FitPlan, device: torch.device) -> Effort:
    """Training batches that a device gets through in seconds."""
    on_gpu = device.type == "cuda"
    return Effort(
        windows=plan.windows, length=plan.length, batch=32 if on_gpu else 8,
        align=256 if on_gpu else 64,
        training_length=plan.length if on_gpu else min(256, plan.length),
    )  # fmt: skip
