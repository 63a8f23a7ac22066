"""What users may rely on: changing it is a decision, so it is written down here."""

from pathlib import Path

import tinier
from tinier.cli.main import VERBS

PUBLIC = [
    "Checkpoint", "DistillPlan", "Engine", "EngineConfig", "InputError", "MeasuredFailure",
    "PrunePlan", "QuantizePlan", "SamplingParams", "TinierError", "distill", "evaluate", "evaluate_mmlu",
    "load_recipe", "open_model", "prune", "quantize", "run_recipe", "write_report",
]  # fmt: skip


def test_public_names_are_pinned_and_there() -> None:
    assert tinier.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(tinier, name).__name__ == name


def test_verbs_are_pinned() -> None:
    assert list(VERBS) == [
        "run", "quantize", "prune", "distill", "eval", "compare", "generate", "bench", "serve",
        "report",
    ]  # fmt: skip


def test_documented_help_is_the_help_of_the_program() -> None:
    from scripts.write_cli_docs import cli_page

    page = Path(__file__).parent.parent / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == cli_page(), "run: python -m scripts.write_cli_docs"
