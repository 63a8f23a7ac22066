"""The search on a tiny model: it keeps the budget, goes on after a stop, and measures nothing twice."""

import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tinier.benchmark import ServingMemory, Workload
from tinier.checkpoint import Checkpoint, open_checkpoint
from tinier.cli.main import main
from tinier.errors import InputError
from tinier.families import checkpoint_layout, geometry_of
from tinier.fitting import Amount, Budget, Figures, FitPlan, Limits, describe, fit, load_fit
from tinier.fitting import driver as driver_module
from tinier.fitting import speed as speed_module
from tinier.fitting.chains import Effort, variants_of
from tinier.fitting.choices import default_formats, least_bytes
from tinier.fitting.costs import Costs, Design
from tinier.fitting.speed import SpeedTable, Times, between
from tinier.kernels.machine import Machine
from tinier.pruning import Sizes
from tinier.pruning.choice import CutCosts
from tinier.quantization.mixed import EMBEDDING_PART, KV_PART, parts_of
from tinier.quantization.plan import format_named
from tinier.recipe import RunResults, load_results, plan_recipe
from tinier.recipe.schema import Measure, QualityMeasure, Recipe
from tinier.report.fitted import fit_text

Tiny = Callable[..., Checkpoint]
LOAD = Workload(concurrency=2, input_length=8, output_length=4)
FORMATS = ("int3:16", "int4-gptq:32", "int8-sq")
CPU = torch.device("cpu")


class FakeClock:
    """Times that are in proportion to bytes, so that sums are exact."""

    timed: list[str] = []  # noqa: RUF012

    def __init__(self, *_: Any) -> None:
        pass

    def time(self, view: Checkpoint) -> Times:
        FakeClock.timed.append(view.folder.name)
        size = sum(info.num_bytes for name, info in view.tensors.items() if "norm" not in name)
        return Times(2e-3 * size, 1e-3 * size + 1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[FakeClock]:
    FakeClock.timed = []
    monkeypatch.setattr(speed_module, "Clock", FakeClock)
    monkeypatch.setattr(
        speed_module, "timed_formats", lambda source, formats, device: dict(formats)
    )
    # processes of their own, seconds each
    memory = ServingMemory(weights_bytes=10**6, kv_bytes=10**5, peak_bytes=10**8, start_bytes=10**7)
    monkeypatch.setattr("tinier.recipe.measure.measure_memory", lambda *_: memory)
    monkeypatch.setattr(driver_module, "_SPREAD", driver_module._SPREAD[:1])
    return FakeClock


@pytest.fixture
def source(tiny: Tiny) -> Checkpoint:
    return tiny(dtype=torch.bfloat16, max_position_embeddings=1024, num_hidden_layers=4)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i}: {i} and {i} is {2 * i}. " for i in range(60)))
    return path


def table_of(source: Checkpoint, path: Path) -> SpeedTable:
    whole = Sizes.of(geometry_of(source))
    narrow = replace(whole, intermediate=whole.intermediate // 2)
    formats = {label: format_named(label) for label in FORMATS}
    return SpeedTable.measure(source, formats, [narrow, whole], LOAD, path, CPU, "int8")


def test_lines_between_points() -> None:
    points = {1.0: Times(1, 10), 2.0: Times(3, 10), 4.0: Times(3, 30)}
    assert between(points, 1.5) == Times(2, 10)
    assert between(points, 3) == Times(3, 20)
    assert between(points, 5) == Times(3, 40)
    assert between({1.0: Times(1, 2)}, 9) == Times(1, 2)


def test_a_model_takes_what_its_parts_take(source: Checkpoint, tmp_path: Path, clock: Any) -> None:
    """Formats mixed by layer, other depth and width than was measured."""
    table = table_of(source, tmp_path / "speed.json")
    whole = Sizes.of(geometry_of(source))
    names = [read.name for read in geometry_of(source).inputs]
    for sizes in (whole, replace(whole, intermediate=whole.intermediate * 3 // 4)):
        layers = [dict(zip(names, labels, strict=True)) for labels in (
            ("int8-sq",) * 4, ("int4-gptq:32",) * 4, ("int3:16",) * 4)]  # fmt: skip
        ends = {EMBEDDING_PART: "int8"}
        formats = {label: format_named(label) for label in FORMATS}
        files = speed_module.SmallModels(
            source, sizes, formats, tmp_path / f"own-{sizes.intermediate}", CPU
        )
        real = FakeClock().time(files.view(layers, ends))
        assert table.of(sizes, layers, ends).step == pytest.approx(real.step, rel=0.02)
        assert table.of(sizes, layers, ends).prompt == pytest.approx(real.prompt, rel=0.02)


def test_times_that_are_known_are_not_measured_again(
    source: Checkpoint, tmp_path: Path, clock: Any
) -> None:
    path = tmp_path / "speed.json"
    table_of(source, path)
    count = len(clock.timed)
    known = json.loads(path.read_text())
    lost = sorted(known)[3]
    path.write_text(json.dumps({name: value for name, value in known.items() if name != lost}))
    left = tmp_path / "speed.models"
    left.mkdir()
    (left / "of-a-call-that-was-killed").touch()
    table_of(source, path)
    assert len(clock.timed) == count + 1
    assert json.loads(path.read_text()) == known
    assert not left.exists()
    table_of(source, path)
    assert len(clock.timed) == count + 1


def test_small_models_run_on_the_engine(source: Checkpoint, tmp_path: Path) -> None:
    table = table_of(source, tmp_path / "speed.json")
    whole = Sizes.of(geometry_of(source))
    assert table.of(whole, [{}] * 4, {}).over(LOAD) > 0


def costs_of(source: Checkpoint, path: Path) -> Costs:
    geometry = geometry_of(source)
    whole = Sizes.of(geometry)
    parts = parts_of(geometry)
    lost = {"int3:16": 0.05, "int4-gptq:32": 0.01, "int8-sq": 0.001}
    divergence = {
        part.name: {label: kl * (1 + number) for label, kl in lost.items()}
        for number, part in enumerate(parts)
    }
    divergence |= {
        EMBEDDING_PART: {"int8": 0.002, "int4": 0.05},
        KV_PART: {"fp8": 0.01, "int8": 0.02},
    }
    return Costs(
        source=source, formats={label: format_named(label) for label in FORMATS}, divergence=divergence,
        cuts=CutCosts(whole, {"layers": 2.0, "intermediate": 1.0}),
        dropped={4: (), 3: (2,), 2: (1, 2)}, table=table_of(source, path), machine=Machine("cpu"),
        load=LOAD, possible=[whole, replace(whole, layers=3), replace(whole, layers=2)],
        base=Figures(float(source.disk_bytes), 1e8, 100.0, 10.0, 1.0), base_weights=1e6,
    )  # fmt: skip


def test_the_solution_is_the_best_of_all_choices(
    source: Checkpoint, tmp_path: Path, clock: Any
) -> None:
    """By trying all formats of two layers, the others left at the solution's."""
    costs = costs_of(source, tmp_path / "speed.json")
    limits = Limits(size=0.5 * source.disk_bytes, throughput=130.0)
    found = costs.solve(limits, pruned=False)
    assert found is not None
    assert limits.broken(costs.predicted(found)) == []
    names = [part.name for part in parts_of(geometry_of(source))][:4]
    for labels in product((*FORMATS, "16bit"), repeat=4):
        other = replace(found, formats=found.formats | dict(zip(names, labels, strict=True)))
        if not limits.broken(costs.predicted(other)):
            assert costs.lost(other) >= costs.lost(found) - 1e-6
    assert costs.solve(Limits(size=1000.0)) is None


def test_fewer_layers_where_formats_are_not_enough(
    source: Checkpoint, tmp_path: Path, clock: Any
) -> None:
    costs = costs_of(source, tmp_path / "speed.json")
    smallest = costs.solve(Limits(), "size", pruned=False)
    assert smallest is not None
    limit = costs.predicted(smallest).size * 0.97
    assert costs.solve(Limits(size=limit), pruned=False) is None
    found = costs.solve(Limits(size=limit))
    assert found is not None
    assert found.sizes.layers < 4
    assert (
        set(found.formats)
        & {p.name for p in parts_of(geometry_of(source)) if p.layer in found.dropped}
        == set()
    )


def test_a_chain_is_pruned_healed_and_quantized_layer_by_layer(
    source: Checkpoint, text_file: Path
) -> None:
    geometry = geometry_of(source)
    whole = Sizes.of(geometry)
    labels = {0: "int8-sq", 1: "int4-gptq:32", 2: "16bit", 3: "int3:16"}
    formats = {part.name: labels[part.layer] for part in parts_of(geometry) if part.layer != 1}
    design = Design(
        replace(whole, layers=3), (1,), formats | {EMBEDDING_PART: "int4", KV_PART: "fp8"}, steps=2
    )
    effort = Effort(windows=2, length=64, batch=2, training_length=64, align=64)
    variants = variants_of(design, "chain", geometry, effort)
    assert list(variants) == ["3L", "3L-healed2", "chain"]
    recipe = Recipe(
        base=str(source.folder), device="cpu", text=str(text_file), variants=variants,
        measure=Measure(quality=QualityMeasure(windows=2, length=64)),
    )  # fmt: skip
    planned = plan_recipe(recipe).planned["chain"].output_config
    layout = checkpoint_layout(replace(source, config=planned))
    assert layout is not None
    got = {n.split(".")[2]: s.weights.bits for n, s in layout.schemes.items() if "layers" in n}
    assert got == {"0": 8, "2": 3}  # layer 2 became layer 1, and stays in 16 bit
    assert layout.kv_cache is not None


def plan_for(source: Checkpoint, text_file: Path, **limits: Any) -> FitPlan:
    return FitPlan(
        model=str(source.folder), budget=Budget(load=LOAD, seconds=600, **limits), text=str(text_file),
        device="cpu", windows=4, length=64, formats=FORMATS, train=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_budget_in_the_best_model_out(
    source: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    out = tmp_path / "run"
    plan = plan_for(source, text_file, max_size=Amount(0.5, relative=True))
    assert "formats" in describe(plan, out)
    found = fit(plan, out, command="test")
    assert found.winner is not None
    winner = open_checkpoint(out / "variants" / found.winner)
    assert winner.disk_bytes <= 0.5 * source.disk_bytes
    rows = {row.name: row for row in load_results(out).variants}
    kept = [r for r in rows.values() if r.disk_bytes <= 0.5 * source.disk_bytes]
    assert rows[found.winner].retained_quality == max(r.retained_quality for r in kept)
    front = list(csv.DictReader((out / "front.csv").read_text().splitlines()))
    assert {row["kind"] for row in front} == {"measured", "predicted"}
    assert abs(found.prediction_errors["size"][0]) < 0.05

    # the same again makes and measures nothing; another budget makes what is new, and measures no part
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("tinier.fitting.sensitivity._divergence", never)
    monkeypatch.setattr("tinier.quantization.mixed.Rounded._round", never)
    monkeypatch.setattr(speed_module.SmallModels, "view", never)
    again = fit(plan, out, command="test")
    assert (again.winner, again.candidates) == (found.winner, found.candidates)
    other = fit(plan_for(source, text_file, min_quality=0.5), out, command="test")
    assert other.winner is not None
    assert set(found.candidates) <= set(other.candidates)
    assert other.draft is None

    # the same search again: only what is asked beside it is measured
    lossless = fit(replace(plan, lossless=True), out, command="test")
    assert set(lossless.candidates) == set(other.candidates)
    assert lossless.draft is not None
    drafts = {row.name: row.draft for row in load_results(out).variants if row.draft}
    assert set(drafts) == set(lossless.candidates)
    best = drafts[lossless.draft.name]
    assert best is not None
    assert lossless.draft.gain == best.gain == max(d.gain for d in drafts.values() if d)
    kept_file = load_fit(out)
    assert kept_file is not None
    assert kept_file.draft == lossless.draft
    slow, fast = (replace(lossless, draft=replace(lossless.draft, gain=g)) for g in (0.9, 1.4))
    assert "no candidate makes" in fit_text(slow)
    assert f"--draft variants/{lossless.draft.name}" in fit_text(fast)


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(
    source: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    out, plan = tmp_path / "run", plan_for(source, text_file, max_size=Amount(0.5, relative=True))
    real, rounds = driver_module.run_recipe, []

    def stopped(recipe: Recipe, *args: Any, **more: Any) -> RunResults:
        rounds.append(list(recipe.variants))
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return real(recipe, *args, **more)

    monkeypatch.setattr(driver_module, "run_recipe", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(plan, out, command="test")
    found = fit(plan, out, command="test")
    assert rounds[1] == rounds[3]  # what was decided before the stop
    assert found.winner is not None


@pytest.mark.slow
def test_a_budget_that_cannot_be_kept(
    source: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], clock: Any,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    geometry = geometry_of(source)
    # what is not refused beforehand, and less than tokenizer, scales and norms leave room for
    formats = default_formats(FORMATS, geometry, CPU)
    least = math.ceil(least_bytes(geometry, formats, 64)) + 1
    arguments = ["fit", str(source.folder), "--text", str(text_file), "--device", "cpu", "--out", str(out),
                 "--windows", "4", "--length", "64", "--load", "8/4@2", "--time", "10m", "--quiet",
                 "--formats", ",".join(FORMATS), "--no-train", "--max-size", f"{least}B"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tinier", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "would be kept with" in said
    assert "--max-size" in said


@pytest.mark.slow
def test_no_more_is_made_than_there_is_time_for(
    source: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    real, late, each = driver_module.run_recipe, [0.0], 250.0
    monkeypatch.setattr(
        driver_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    )
    monkeypatch.setattr(driver_module, "_SPREAD", [(0.9 - i / 20, "smaller") for i in range(8)])

    def slow(recipe: Recipe, out: Path, *args: Any, **more: Any) -> RunResults:
        made = [name for name in recipe.variants if not (out / "variants" / name).exists()]
        late[0] += each * len(made)
        return real(recipe, out, *args, **more)

    monkeypatch.setattr(driver_module, "run_recipe", slow)
    plan = plan_for(source, text_file, max_size=Amount(0.5, relative=True))
    plan = replace(plan, budget=replace(plan.budget, seconds=1200), prune=False)
    found = fit(plan, tmp_path / "run", command="test")
    assert 1000 <= found.seconds <= 1230  # the machine's own seconds are in it too


@pytest.mark.slow
def test_the_winner_is_rounded_with_more_care_where_there_is_time(
    source: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    monkeypatch.setattr(driver_module, "_SPREAD", ())
    plan = plan_for(source, text_file, max_size=Amount(0.4, relative=True))
    found = fit(replace(plan, prune=False), tmp_path / "run", command="test")
    (name,) = [name for name in found.candidates if name.endswith("-fisher")]
    for made, weighting, drift in (
        (name, "fisher", "corrected"),
        (name.removesuffix("-fisher"), "none", "ignored"),
    ):
        manifest = json.loads((tmp_path / "run/variants" / made / "tinier.json").read_text())
        assert manifest["parameters"]["weighting"] == weighting
        assert manifest["parameters"]["drift"] == drift
    rows = {row.name: row for row in load_results(tmp_path / "run").variants}
    plain = rows[name.removesuffix("-fisher")]  # the manifests differ in length
    assert abs(rows[name].disk_bytes - plain.disk_bytes) < 0.01 * plain.disk_bytes

    monkeypatch.setattr(driver_module, "_FISHER_TIMES", {"cpu": 1e9})
    found = fit(replace(plan, prune=False), tmp_path / "short", command="test")
    assert not [name for name in found.candidates if name.endswith("-fisher")]


@pytest.mark.slow
def test_the_winner_is_trained_shortly_and_then_as_long_as_there_is_time(
    source: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    monkeypatch.setattr(driver_module, "_MOST_STEPS", 25)
    plan = plan_for(source, text_file, max_size=Amount(0.4, relative=True))
    found = fit(replace(plan, train=True, prune=False), tmp_path / "run", command="test")
    trained = [name for name in found.candidates if "-trained" in name]
    quality = {row.name: row.retained_quality for row in load_results(tmp_path / "run").variants}
    plain, short = trained[0].removesuffix("-trained10"), trained[0]
    assert short.endswith("-trained10")
    assert [name.removeprefix(plain) for name in trained[1:]] == ["-trained25"] * (
        quality[short] > quality[plain]
    )


def test_bad_input_is_refused_before_any_work(
    source: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no budget"):
        fit(plan_for(source, text_file), tmp_path / "run", command="test")
    plan = plan_for(source, text_file, min_quality=0.9)
    with pytest.raises(InputError, match="Presets"):
        fit(replace(plan, formats=("int5",)), tmp_path / "run", command="test")
    for option in ("max_size", "max_memory"):
        small = plan_for(source, text_file, **{option: Amount(1000, relative=False)})
        with pytest.raises(
            InputError, match=rf"--{option.replace('_', '-')} 0.001MB cannot be kept"
        ):
            fit(small, tmp_path / "run", command="test")
    assert not (tmp_path / "run").exists()
