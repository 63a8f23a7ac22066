"""What users may rely on: changing it is a decision, so it is written down here."""

import json
import re
import subprocess
from pathlib import Path

import tinier
from tinier.cli.main import VERBS

PUBLIC = [
    "Budget", "Checkpoint", "DistillPlan", "Engine", "EngineConfig", "FitPlan", "FitResults", "HealPlan",
    "InputError", "MeasuredFailure", "MmluPlan", "PrunePlan", "Quality", "QuantizePlan", "Recipe",
    "RunResults", "SamplingParams", "TinierError", "Workload", "bench", "compare", "compare_draft",
    "distill", "evaluate", "export", "fit", "generate", "load_recipe", "load_results", "open_model",
    "prune", "prune_and_heal", "quantize", "run_recipe", "write_report",
]  # fmt: skip


def test_public_names_are_pinned_and_there() -> None:
    assert tinier.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(tinier, name).__name__ == name


def test_the_version_is_that_of_the_tag_and_the_changelog() -> None:
    root = Path(__file__).parent.parent
    assert f"## {tinier.__version__}\n" in (root / "CHANGELOG.md").read_text("utf-8")
    found = subprocess.run(
        ["git", "describe", "--exact-match", "--tags"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode == 0:
        assert found.stdout.strip() == f"v{tinier.__version__}"


def test_verbs_are_pinned() -> None:
    assert list(VERBS) == [
        "run", "fit", "quantize", "prune", "distill", "export", "import", "eval", "compare", "generate",
        "bench", "serve", "report", "advise", "doctor",
    ]  # fmt: skip


def test_the_table_of_exports_is_that_of_the_rules() -> None:
    from scripts.write_export_matrix import PAGE, page_with_table

    text = PAGE.read_text(encoding="utf-8")
    assert page_with_table(text) == text, "run python -m scripts.write_export_matrix"


def test_what_loads_in_vllm_is_what_was_measured() -> None:
    """docs/loading.md has every format that a preset stores, with the figures of the result file that it
    names."""
    from tinier.schemes import PRESETS

    root = Path(__file__).parent.parent
    page = (root / "docs" / "loading.md").read_text(encoding="utf-8").partition("## Exports")[0]
    (name,) = set(re.findall(r"benchmarks/results/(vllm-agreement\S*\.json)", page))
    measured = json.loads((root / "benchmarks" / "results" / name).read_text())["rows"]
    lines = [line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| ")]
    rows = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}
    assert rows.keys() == measured.keys()
    formats = {PRESETS[name].scheme for name in measured if name in PRESETS}
    assert {preset.scheme for preset in PRESETS.values()} <= formats
    for preset, found in measured.items():
        if not found["loads"]:
            assert rows[preset][1].startswith("refused")
            continue
        figures = [found["perplexity_tinier"], found["perplexity_vllm"]]
        difference = found["mean_abs_logprob_difference"]
        assert rows[preset] == [*(f"{figure:.2f}" for figure in figures), f"{difference:.3f}"]


def test_documented_help_is_the_help_of_the_program() -> None:
    from scripts.write_cli_docs import cli_page

    page = Path(__file__).parent.parent / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == cli_page(), "run: python -m scripts.write_cli_docs"
