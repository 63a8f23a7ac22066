"""The main job on a tiny model: results, resume, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tinier.checkpoint import Checkpoint, open_checkpoint
from tinier.errors import (
    InputError,
    MeasuredFailure,
    OutputError,
    RecipeError,
    SchemeError,
    TextError,
)
from tinier.families import geometry_of
from tinier.kernels.native import load_library
from tinier.recipe import (
    Failure,
    Recipe,
    describe,
    load_recipe,
    load_results,
    plan_recipe,
    run_recipe,
)
from tinier.recipe import measure as measure_module
from tinier.recipe import run as run_module
from tinier.report import markdown_table, table_rows, write_report

Tiny = Callable[..., Checkpoint]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i}: {i} and {i} is {2 * i}. " for i in range(60)))
    return path


@pytest.fixture
def values(tiny: Tiny, text_file: Path, mmlu_folder: Path) -> dict[str, Any]:
    base = tiny(dtype=torch.bfloat16, max_position_embeddings=1024, num_hidden_layers=5)
    return {
        "base": str(base.folder),
        "device": "cpu",
        "text": str(text_file),
        "variants": {
            "fp8": {"quantize": {"preset": "fp8"}},
            "int4": {"quantize": {"preset": "int4", "group_size": 32}},
            "pruned": {"prune": {"keep_layers": "60%", "windows": 2, "length": 64}},
            "distilled": {
                "from": "pruned",
                "distill": {
                    "steps": 3, "batch": 2, "micro_batch": 2, "length": 64, "warmup_steps": 1,
                },
            },
            "fp8-distilled": {"from": "distilled", "quantize": {"preset": "fp8"}},
        },
        "measure": {
            "quality": {"windows": 2, "length": 64},
            "speed": {
                "concurrency": [1, 2], "input_length": 8, "output_length": 4, "repeats": 2,
            },
        },
    }  # fmt: skip


def recipe_of(values: dict[str, Any], tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_recipe(path)


def test_the_whole_run(values: dict[str, Any], tmp_path: Path) -> None:
    values["measure"]["mmlu"] = {"folder": str(tmp_path / "mmlu"), "shots": 1, "sample": 6}
    values["measure"]["quality"] |= {"long": 128, "own_text": 16}
    values["measure"]["draft"] = True
    recipe = recipe_of(values, tmp_path)
    out = tmp_path / "run"
    results = run_recipe(recipe, out, command="tinier run recipe.yaml")
    rows = {row.name: row for row in results.variants}
    assert list(rows) == ["base", "fp8", "int4", "pruned", "distilled", "fp8-distilled"]
    assert rows["base"].quality.kl == 0.0
    assert rows["base"].speedup == rows["base"].shrinkage == 1.0
    assert rows["base"].retained_quality == 1.0
    assert 0 < rows["fp8"].quality.kl < rows["int4"].quality.kl
    assert [rows[n].layers for n in rows] == [5, 5, 5, 3, 3, 3]
    assert rows["fp8"].bits_per_weight < 16 == pytest.approx(rows["base"].bits_per_weight)
    slow = ("no fast path on this device: FP8 W8A8 expanded to bfloat16",)
    assert rows["fp8"].notes == (slow if isinstance(load_library(), str) else ())
    for row in rows.values():
        assert row.mmlu.questions == 6
        assert row.long.tokens == 2 * 127
        assert (row.own_text is None) == (row.name == "base")
        assert len(row.speed) == 2
        assert row.memory.peak_bytes > 0
        if row.name != "base":
            assert row.own_text.tokens == 2 * 16
            assert 0 < row.draft.drawn <= 1
            assert row.draft.gain > 0
            assert row.own_text.kl > 0
            assert row.changes["mmlu"].lost + row.changes["mmlu"].gained <= 6
    assert results.environment["versions"]["torch"] == torch.__version__
    assert results.seed == 0
    assert json.loads((out / "results.json").read_text()) == results.to_json()
    assert load_results(out) == results

    write_report(results, out)
    names = {path.name for path in out.iterdir()}
    assert {"report.md", "pareto-throughput.svg", "pareto-throughput.png", "pareto-size.svg",
            "pareto-size.png", "results.json", "variants", "measurements"} <= names  # fmt: skip
    page = (out / "report.md").read_text()
    assert markdown_table(results) in page
    head, lines = table_rows(results)
    assert len(lines) == 6
    assert all(len(line) == len(head) for line in lines)
    assert {"MMLU %", "KL at 128 tokens", "KL, own text"} <= set(head)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("aiperf")
def test_every_variant_is_served_under_load(values: dict[str, Any], tmp_path: Path) -> None:
    values["variants"] = {"fp8": values["variants"]["fp8"]}
    values["measure"]["serving"] = {
        "concurrency": [2], "request_rate": [20.0], "input_length": 20, "output_length": 8,
        "requests": 8,
    }  # fmt: skip
    recipe = recipe_of(values, tmp_path)
    out = tmp_path / "run"
    results = run_recipe(recipe, out, command="tinier run recipe.yaml")
    for row in results.variants:
        for served in row.serving:
            assert (served.requests, served.errors) == (8, 0)
            assert served.latency_ms["p95"] >= served.ttft_ms["p95"] > 0
    before = times(out)
    assert run_recipe(recipe, out, command="again").variants == results.variants
    assert times(out) == before
    page = write_report(results, out).with_suffix(".md").read_text()
    assert "| base | 2 in flight |" in page
    assert "| fp8 | 2 in flight |" in page
    assert "fp8, 20 requests/s: 95 % within the target" in page


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"concurrency": []}, "give a concurrency or a request_rate"),
        ({"concurrency": [0]}, "concurrency=0"),
        ({"input_length": 2000}, "2128"),
    ],
)
def test_an_impossible_load_is_found_before_any_work(
    values: dict[str, Any], tmp_path: Path, serving: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tinier.recipe.plan.find_aiperf", lambda: "aiperf")
    values["measure"]["serving"] = serving
    with pytest.raises(InputError, match=message):
        plan_recipe(recipe_of(values, tmp_path))


def times(out: Path) -> dict[str, int]:
    paths = [*out.glob("variants/*/tinier.json"), *out.glob("measurements/*.json")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in paths}


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    values: dict[str, Any], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "run"
    first = run_recipe(recipe_of(values, tmp_path), out, command="")
    before = times(out)
    assert len(before) == 5 + 6
    second = run_recipe(recipe_of(values, tmp_path), out, command="")
    assert times(out) == before
    assert replace(first, created="") == replace(second, created="")

    # another group size: int4 alone is made and measured again
    values["variants"]["int4"]["quantize"]["group_size"] = 16
    run_recipe(recipe_of(values, tmp_path), out, command="")
    changed = {path for path, when in times(out).items() if before[path] != when}
    assert changed == {"variants/int4/tinier.json", "measurements/int4.json"}

    # other pruning: what comes after it too
    before = times(out)
    values["variants"]["pruned"]["prune"] = {"drop_layers": "2", "length": 64}
    run_recipe(recipe_of(values, tmp_path), out, command="")
    # beside a variant whose best step was not its last, that last one is kept
    after = {path: when for path, when in times(out).items() if "-last" not in path}
    changed = {path for path, when in after.items() if before[path] != when}
    assert changed == {
        f"{kind.format(name)}"
        for name in ("pruned", "distilled", "fp8-distilled")
        for kind in ("variants/{}/tinier.json", "measurements/{}.json")
    }


@pytest.mark.slow
def test_a_variant_that_fails_does_not_lose_the_others(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its stage, in what starts from it, or while it is measured."""

    def broken(*_: object, **__: object) -> None:
        raise MeasuredFailure("the loss grew")

    measure = measure_module.Measurements._speed

    def measured(self: Any, name: str) -> Any:
        if name == "int4":
            raise RuntimeError("no\nspeed")
        return measure(self, name)

    monkeypatch.setattr("tinier.recipe.plan.distill", broken)
    monkeypatch.setattr(measure_module.Measurements, "_speed", measured)
    out = tmp_path / "run"
    results = run_recipe(recipe_of(values, tmp_path), out, command="")
    assert [row.name for row in results.variants] == ["base", "fp8", "pruned"]
    assert results.failed == (
        Failure(variant="distilled", what="stage", error="the loss grew"),
        Failure(variant="fp8-distilled", what="stage", error="it needs distilled, which failed"),
        Failure(variant="int4", what="speed", error="RuntimeError: no speed"),
    )
    assert (
        "distilled failed (stage): the loss grew"
        in write_report(results, out).with_suffix(".md").read_text()
    )
    monkeypatch.undo()
    again = run_recipe(recipe_of(values, tmp_path), out, command="")
    assert len(again.variants) == 6
    assert not again.failed


def test_the_base_s_failure_is_the_run_s(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise InputError("no numbers")

    monkeypatch.setattr(measure_module.Measurements, "_quality", broken)
    values["variants"] = {"fp8": values["variants"]["fp8"]}
    with pytest.raises(InputError, match="no numbers"):
        run_recipe(recipe_of(values, tmp_path), tmp_path / "run", command="")


@pytest.mark.slow
def test_an_old_variant_stays_until_the_new_one_is_there(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: the code is another, so is the key; a failure or a kill costs nothing."""
    values["variants"] = {"fp8": values["variants"]["fp8"]}
    out = tmp_path / "run"
    run_recipe(recipe_of(values, tmp_path), out, command="")
    old = open_checkpoint(out / "variants" / "fp8")
    values["variants"]["fp8"]["quantize"] = {"preset": "int8"}

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinier.recipe.plan.quantize", broken)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe_of(values, tmp_path), out, command="")
    assert open_checkpoint(out / "variants" / "fp8").hash == old.hash
    monkeypatch.undo()
    # killed when the new one was whole and had not taken its place
    real = run_module._replace
    monkeypatch.setattr(run_module, "_replace", broken)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe_of(values, tmp_path), out, command="")
    assert {p.name for p in (out / "variants").iterdir()} == {"fp8", "fp8+new"}
    monkeypatch.setattr(run_module, "_replace", real)
    monkeypatch.setattr("tinier.recipe.plan.quantize", broken)  # it is found, not made
    results = run_recipe(recipe_of(values, tmp_path), out, command="")
    assert results.variants[1].precision == "INT8 W8A8"
    assert {p.name for p in (out / "variants").iterdir()} == {"fp8"}


@pytest.mark.slow
def test_a_damaged_variant_is_made_again(values: dict[str, Any], tmp_path: Path) -> None:
    values["variants"] = {"fp8": values["variants"]["fp8"]}
    out = tmp_path / "run"
    first = run_recipe(recipe_of(values, tmp_path), out, command="")
    weights = next((out / "variants" / "fp8").glob("model-00001-of-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    second = run_recipe(recipe_of(values, tmp_path), out, command="")
    assert first.variants[1].content_hash == second.variants[1].content_hash


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    recipe_of(values, tmp_path)
    command = [
        sys.executable, "-m", "tinier.cli.main", "run", str(tmp_path / "recipe.yaml"),
        "--out", str(tmp_path / "run"), "--quiet",
    ]  # fmt: skip
    whole = run_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "whole", command="")
    kills = 0
    for seconds in (6.0, 7.0, 8.0, 9.5, 11.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        for manifest in (tmp_path / "run").glob("variants/*/"):
            if not manifest.name.startswith("."):
                assert (manifest / "tinier.json").exists(), "a half-written variant is visible"
    assert kills >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    resumed = load_results(tmp_path / "run")
    for ours, theirs in zip(resumed.variants, whole.variants, strict=True):
        assert ours.content_hash == theirs.content_hash
        assert ours.quality == theirs.quality
    leftovers = [p for p in (tmp_path / "run" / "variants").iterdir() if p.name.startswith(".")]
    assert leftovers == []


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (
            ("variants", "int4", "quantize"),
            {"preset": "int4", "group_size": 128},
            SchemeError,
            "128 does not",
        ),
        (("variants", "fp8", "quantize"), {"preset": "fp7"}, SchemeError, "'fp7' is not known"),
        (("variants", "fp8-distilled", "from"), "fp8", SchemeError, "is quantized already"),
        (("variants", "pruned", "prune"), {"drop_layers": "3-9"}, InputError, "do not exist"),
        (("variants", "pruned", "prune"), {"drop_layers": "0-4"}, InputError, "leaves none"),
        (("variants", "distilled", "from"), "int4", SchemeError, "the student .* is quantized"),
        (("variants", "distilled", "distill", "teacher"), "fp8", SchemeError, "the teacher"),
        (("variants", "distilled", "distill", "batch"), 3, InputError, "does not divide batch=3"),
        (("text",), "/nowhere.txt", TextError, "is no file and no folder"),
        (("measure", "quality", "length"), 1024, TextError, "less than one window"),
        (("measure", "quality", "length"), 2000, InputError, "more than the 1024 positions"),
        (("measure", "speed", "input_length"), 1021, InputError, "more than the 1024 positions"),
        (
            ("variants", "pruned", "prune"),
            {"keep_layers": 3, "length": 2000},
            InputError,
            "1024 positions",
        ),
        (("measure", "mmlu"), {"folder": "nowhere"}, TextError, "is no MMLU folder"),
        (("measure", "speed", "output_length"), 1, InputError, "output_length=1. Use 2 or more"),
        (("device",), "tpu", InputError, "'tpu' is not known"),
    ],
)
def test_mistakes_anywhere_are_found_before_any_work(
    values: dict[str, Any],
    tmp_path: Path,
    path: tuple[str, ...],
    value: object,
    error: type[Exception],
    message: str,
) -> None:
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(error, match=message):
        run_recipe(recipe_of(values, tmp_path), tmp_path / "run", command="")
    assert not (tmp_path / "run").exists()


def test_a_layer_that_pruning_removed_is_out_of_range(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["variants"]["again"] = {"from": "pruned", "prune": {"drop_layers": "3", "length": 64}}
    with pytest.raises(InputError, match="has layers 0 to 2"):
        plan_recipe(recipe_of(values, tmp_path))


@pytest.mark.slow
def test_sizes_for_a_target_are_such_that_later_stages_can_store_them(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path
) -> None:
    """Planned on sizes that are possible, and made on those that were chosen; or refused beforehand."""
    base = tiny(
        name="wide", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, head_dim=64,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    size = round(0.72 * geometry_of(base).parameters / 1e6, 2)
    values["base"] = str(base.folder)
    cut = {"target": f"{size}M", "windows": 2, "length": 64, "align": 16, "candidates": 2,
           "refit": False}  # fmt: skip
    values["variants"] = {
        "small": {"prune": cut},
        "again": {"from": "small", "prune": {"drop_layers": "0", "length": 64, "refit": False}},
        "int4": {"from": "again", "quantize": {"preset": "int4", "group_size": 128}},
    }
    recipe = recipe_of(values, tmp_path)
    results = run_recipe(recipe, tmp_path / "run", command="")
    assert not results.failed
    assert [row.name for row in results.variants] == ["base", "small", "again", "int4"]
    made = geometry_of(open_checkpoint(tmp_path / "run" / "variants" / "small"))
    assert all(columns % 128 == 0 for _, columns in made.linears.values())
    values["variants"]["int4"]["quantize"]["group_size"] = 256
    values["variants"]["small"]["prune"]["target"] = f"{size / 1.5:.2f}M"
    with pytest.raises(InputError, match="no sizes between half of the model and all of it"):
        plan_recipe(recipe_of(values, tmp_path))


def test_a_folder_that_distillation_needs_is_no_variant_s_name(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["variants"]["distilled-last"] = {"quantize": {"preset": "fp8"}}
    with pytest.raises(RecipeError, match="'distilled' is distilled and keeps other weights"):
        recipe_of(values, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["cpu_cores", "torch_threads"])
def test_speed_is_measured_again_on_other_cores(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    values["variants"] = {"fp8": values["variants"]["fp8"]}
    out = tmp_path / "run"
    run_recipe(recipe_of(values, tmp_path), out, command="")
    before = json.loads((out / "measurements" / "fp8.json").read_text())
    real = measure_module.environment
    monkeypatch.setattr(measure_module, "environment", lambda device: real(device) | {named: 99})
    run_recipe(recipe_of(values, tmp_path), out, command="")
    after = json.loads((out / "measurements" / "fp8.json").read_text())
    assert before["speed"]["key"] != after["speed"]["key"]
    assert before["quality"] == after["quality"]


def test_the_plan_names_stages_and_costs(values: dict[str, Any], tmp_path: Path) -> None:
    plan = describe(plan_recipe(recipe_of(values, tmp_path)), tmp_path / "run")
    assert [s["variant"] for s in plan["stages"]] == list(values["variants"])
    assert plan["estimated_disk_bytes"] > 0
    assert plan["estimated_seconds"] >= 0
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_runs_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="is not a run folder"):
        run_recipe(recipe_of(values, tmp_path), other, command="")
    assert [p.name for p in other.iterdir()] == ["mine.txt"]


def test_two_runs_do_not_share_a_folder(values: dict[str, Any], tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.json").write_text("{}")  # what makes it a run folder
    with (out / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another tinier is working"):
            run_recipe(recipe_of(values, tmp_path), out, command="")
