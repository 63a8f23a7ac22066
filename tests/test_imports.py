"""Each folder may import those above it, never those below (docs/design.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinier

ROOT = Path(tinier.__file__).parent
ORDER = [
    "errors", "numerics", "progress", "device", "ranks", "schemes", "checkpoint", "families", "tokenizer",
    "kernels", "engine", "text", "calibration", "quantization", "pruning", "distillation", "evaluation",
    "benchmark", "serving", "exporting", "search", "recipe", "fitting", "advice", "report", "cli",
]  # fmt: skip


SHOWN = {"recipe/results.py", "fitting/results.py"}
"""Their classes show themselves in notebooks, by a part below."""


def imported_parts(path: Path) -> set[str]:
    """The parts of tinier that a file imports, wherever in the file it does."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module]
            if node.module == "tinier":
                names = [f"tinier.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("tinier.")}
    return parts & {p.stem for p in ROOT.iterdir()}


def files_of(part: str) -> list[Path]:
    path = ROOT / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_every_part_has_a_place_in_the_order() -> None:
    found = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_a_part_imports_only_parts_above_it(part: str) -> None:
    allowed = set(ORDER[: ORDER.index(part) + 1])
    for path in files_of(part):
        shown = {"report"} if str(path.relative_to(ROOT)) in SHOWN else set()
        assert imported_parts(path) <= allowed | shown, f"{path} imports a part below {part}"


def test_numerics_imports_only_torch() -> None:
    for path in files_of("numerics"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert node.module.split(".")[0] in {"torch", "typing"} or node.module.startswith(
                    "tinier.numerics"
                )
            elif isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"torch", "math"}


def test_a_stage_does_not_wait_for_what_draws_and_tests() -> None:
    """A second and more of each command, also of one that only says what is wrong."""
    code = (
        "import sys, tinier.quantization\n"
        "early = {'torch._dynamo'} & set(sys.modules)\n"
        "import tinier.pruning, tinier.report.terminal\n"
        "sys.exit(str(early | {'scipy.stats', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, tinier, tinier.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
