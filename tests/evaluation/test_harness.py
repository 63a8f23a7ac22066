"""lm-evaluation-harness on tinier's engine: the figures of its own `hf` model, from task files that need no
network."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinier.checkpoint import Checkpoint
from tinier.cli.main import main
from tinier.errors import InputError
from tinier.evaluation import TasksPlan
from tinier.recipe import Recipe, run_recipe
from tinier.report import table_rows, write_report
from tinier.report.html import Run, page_data

lm_eval = pytest.importorskip("lm_eval")
harness = pytest.importorskip("tinier.evaluation.harness")

CAPITALS = [
    ("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Spain", "Madrid"),
    ("Egypt", "Cairo"), ("Greece", "Athens"), ("Cuba", "Havana"), ("Peru", "Lima"),
]  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task of each kind: choices, texts of whole documents, answers written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    cities = [city for _, city in CAPITALS]
    rows = [
        {"question": f"The capital of {country} is", "choices": cities, "label": i,
         "text": f"{country} is a country. Its capital, {city}, is a city of many people.",
         "answer": city}
        for i, (country, city) in enumerate(CAPITALS)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "metadata": {"version": 1.0},
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "capitals": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_target": "label", "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "prose": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "written": {
            "output_type": "generate_until", "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [".", ","], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "ignore_case": True}],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | kind))
    return folder


def plan(tasks: Path, *names: str, **more: Any) -> TasksPlan:
    return TasksPlan(names=names, include=str(tasks), **more)


@pytest.mark.slow
@pytest.mark.network
def test_figures_are_those_of_lm_eval_s_own_model(
    smollm2: Checkpoint, tasks: Path, tmp_path: Path
) -> None:
    # in float32, so that no rounding tells them apart
    exact = tmp_path / "exact"
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    model.save_pretrained(exact)
    AutoTokenizer.from_pretrained(smollm2.folder).save_pretrained(exact)
    names = ("capitals", "prose", "written")
    ours = harness.run_tasks(str(exact), plan(tasks, *names, shots=1), device="cpu")
    asked = plan(tasks, *names, shots=1)
    drafted = harness.run_tasks(str(exact), asked, device="cpu", draft="prompt")
    assert [task.metrics for task in drafted] == [task.metrics for task in ours]
    theirs = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(exact), "dtype": "float32"}, list(names), num_fewshot=1,
        device="cpu", bootstrap_iters=0, task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
        random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
    )  # fmt: skip
    for result in ours:
        assert result.documents == len(CAPITALS)
        for name, metric in result.metrics.items():
            expected = theirs["results"][result.name][f"{name},none"]
            assert metric.value == pytest.approx(expected, rel=1e-4), (result.name, name)
    answers = ours[0].metrics["acc"].answers
    samples = sorted(theirs["samples"]["capitals"], key=lambda sample: sample["doc_id"])
    assert answers == "".join(str(int(sample["acc"])) for sample in samples)
    assert ours[0].metrics["acc"].value > 0.5  # it knows some


@pytest.mark.slow
@pytest.mark.network
def test_on_the_command_line(
    smollm2: Checkpoint, tasks: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", [
        "tinier", "eval", str(smollm2.folder), "--against", str(smollm2.folder), "--windows", "1",
        "--length", "32", "--device", "cpu", "--tasks", "capitals", "--include", str(tasks), "--json",
    ])  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    found = json.loads(capsys.readouterr().out)
    (task,) = found["tasks"]
    assert task["documents"] == len(CAPITALS)
    assert found["changes"]["capitals/acc"]["p_value"] == 1.0


@pytest.mark.slow
@pytest.mark.network
def test_lm_eval_knows_the_model_through_our_module(smollm2: Checkpoint, tasks: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinier.evaluation.harness", "run", "--model", "tinier",
         "--model_args", f"pretrained={smollm2.folder}", "--device", "cpu", "--tasks", "capitals",
         "--include_path", str(tasks), "--limit", "2"],
        capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    assert "capitals" in done.stdout
    assert "acc_norm" in done.stdout


@pytest.mark.slow
def test_tasks_in_a_recipe_are_columns_compared_in_pairs(
    tiny: Callable[..., Checkpoint], tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{city} is a city. " * 60 for _, city in CAPITALS)
    )
    recipe = Recipe.model_validate(
        {
            "base": str(tiny(max_position_embeddings=512).folder), "device": "cpu",
            "text": str(tmp_path / "text.txt"),
            "variants": {"fp8": {"quantize": {"preset": "fp8"}}},
            "measure": {
                "quality": {"windows": 2, "length": 64},
                "speed": {"concurrency": [1], "input_length": 8, "output_length": 4, "repeats": 1},
                "tasks": {"names": ["capitals", "prose"], "include": str(tasks), "max_length": 400},
            },
        }
    )  # fmt: skip
    results = run_recipe(recipe, tmp_path / "run", command="test")
    assert not results.failed
    for row in results.variants:
        assert [task.name for task in row.tasks] == ["capitals", "prose"]
        assert row.tasks[0].documents == len(CAPITALS)
    assert set(results.variants[1].changes) == {"capitals/acc", "capitals/acc_norm"}
    head, _ = table_rows(results)
    assert {"capitals %", "prose word_perplexity"} <= set(head)
    columns = {c["key"]: c for c in page_data([Run(results, tmp_path / "run")])["columns"]}
    assert columns["prose/word_perplexity"]["lower"]
    assert not columns["capitals/acc_norm"]["lower"]
    write_report(results, tmp_path / "run")
    page = (tmp_path / "run/report.md").read_text()
    assert "Answers against the base's, in pairs" in page
    # nothing is measured again
    again = run_recipe(recipe, tmp_path / "run", command="test")
    assert again.variants == results.variants


def test_unknown_tasks_and_folders_are_named(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task 'capitols'.*capitals"):
        harness.check_tasks(plan(tasks, "capitols"))
    with pytest.raises(InputError, match="is no folder. Give one with task files"):
        harness.check_tasks(TasksPlan(names=("capitals",), include=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("given", "named"),
    [({"names": ()}, "a task has no name"), ({"names": ("",)}, "a task has no name"),
     ({"names": ("a", "a")}, "twice"),
     ({"names": ("a",), "limit": 0}, "limit=0"), ({"names": ("a",), "shots": -1}, "shots=-1")],
)  # fmt: skip
def test_plans_that_make_no_sense(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TasksPlan(**given)
