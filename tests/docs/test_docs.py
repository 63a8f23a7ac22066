"""The documentation: links lead somewhere, commands run, both languages show the same, the site builds."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from scripts.run_docs import DOCS, PAGES, blocks_of, run, run_all, with_outputs
from scripts.run_notebooks import NOTEBOOKS, run_notebook

from tinier.checkpoint import Checkpoint
from tinier.cli.main import app
from tinier.families import geometry_of
from tinier.schemes import PRESETS

ROOT = DOCS.parent
MARKDOWN = sorted({*DOCS.rglob("*.md"), *ROOT.glob("*.md")})
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
"""A block: its language, and what is in it"""


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]+`", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "mailto:", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def shown_commands(text: str) -> list[str]:
    """All that a page shows of `tinier …`, without the program's name, in blocks and within lines."""
    lines = [
        line for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`(tinier [^`]+)`", FENCE.sub("", text))
    start = re.compile(r"(?:\$ )?(?:torchrun .*? )?(?:python -m )?tinier ([a-z]+ .*)")
    return [re.split(r" #|[|>]", found[1])[0] for line in lines if (found := start.match(line))]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_are_the_program_s(path: Path) -> None:
    """Also those that are not run: their verbs, options and presets exist."""
    if path.name in ("log.md", "CHANGELOG.md"):  # of earlier versions too
        return
    verbs: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in shown_commands(path.read_text("utf-8")):
        verb, *words = line.split()
        assert verb in verbs, line
        params = verbs[verb].params
        known = {name for param in params for name in (*param.opts, *param.secondary_opts)}
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= {*known, "--help"}, line
        for option, value in pairwise(words):
            if option == "--preset" and re.fullmatch(r"[a-z][a-z0-9-]*", value):
                assert value in {*PRESETS, "mixed", "mixed-best", "null"}, line


@pytest.mark.parametrize("page", sorted(path.stem for path in (DOCS / "guide").glob("*.md")))
def test_the_korean_guide_shows_the_same_commands_and_outputs(page: str) -> None:
    english, korean = (
        [block for _, block in blocks_of((folder / f"{page}.md").read_text("utf-8"))]
        for folder in (DOCS / "guide", DOCS / "ko" / "guide")
    )
    assert english == korean
    assert all(block.runs for block in english) or page not in PAGES
    assert page in PAGES or not english  # else nothing runs them


def test_outputs_are_pasted_behind_their_commands() -> None:
    page = "A\n```console\n$ one \\\n    two\nold\n$ cat <<'EOF'\nx\nEOF\n```\nB\n"
    ((_, block),) = blocks_of(page)
    assert block.commands == ("one \\\n    two", "cat <<'EOF'\nx\nEOF")
    assert block.output == "old"
    changed = with_outputs(page, {block.commands: "new"})
    ((_, again),) = blocks_of(changed)
    assert again == block._replace(output="new")
    assert changed.startswith("A\n")
    assert changed.endswith("```\nB\n")


def test_a_command_that_fails_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit 3"):
        run("exit 3", tmp_path, "model")


def test_readmes_are_short() -> None:
    for name in ("README.md", "README.ko.md"):
        assert len((ROOT / name).read_text("utf-8").splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the guide asks a server with curl")
def test_every_command_of_the_guide_runs(
    tiny: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a tiny model in place of SmolLM2."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests beside it wait for servers' heartbeats
    source = tiny(
        num_hidden_layers=10, hidden_size=64, intermediate_size=192, max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )  # fmt: skip
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (source.folder / "chat_template.jinja").write_text(template)
    assert run_all(str(source.folder), tmp_path)


SMALLER = {
    "MODEL": "{model}", "smollm2-135m": "{model}", "books/": "{text}", "2688": "64", "2.4B": "{target}",
    "400": "2", "--batch 64": "--batch 2 --length 64", "2.4GB": "2.4GB --no-train", "512/128@4": "8/4@2",
    "2h": "1m --formats int4-gptq:32 --windows 4 --length 64",
}  # fmt: skip
"""What the guide's examples for a large model are for a tiny one"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_examples_for_large_models_run_on_a_tiny_one(
    tiny: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of the guide's commands that are not run with their output, but load tests, which
    tests/benchmark runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = tiny(hidden_size=128, intermediate_size=256, max_position_embeddings=2048,
                  dtype=torch.bfloat16)  # fmt: skip
    text_file = tmp_path / "prose.txt"
    text_file.write_text("The ship sailed on, and nobody spoke of the storm. " * 400)
    target = f"{0.8 * geometry_of(source).parameters / 1e6:.3f}M"
    ran = []
    for page in sorted((DOCS / "guide").glob("*.md")):
        fences = FENCE.findall(page.read_text("utf-8"))
        for _, block in (fence for fence in fences if not fence[0]):
            for command in shown_commands(f"```\n{block}```"):
                if command.startswith("bench http"):
                    continue
                for given, small in SMALLER.items():
                    command = re.sub(rf"(?<!\S){re.escape(given)}(?!\S)", small, command)
                command = command.format(model=source.folder, text=text_file, target=target)
                done = subprocess.run(
                    [sys.executable, "-m", "tinier", *command.split()],
                    cwd=tmp_path, capture_output=True, text=True, check=False,
                )  # fmt: skip
                # a budget that no model keeps ends with 1, and says which limit
                assert done.returncode in (0, 1 if command.startswith("fit") else 0), done.stderr
                ran.append(command.split()[0])
    assert ran == ["distill", "prune", "prune", "prune", "fit"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(
    tiny: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    source = tiny(num_hidden_layers=8, max_position_embeddings=2048, dtype=torch.bfloat16)
    monkeypatch.setenv("TINIER_MODEL", str(source.folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    *_, last = run_notebook(path).cells
    assert last.outputs


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/explained/quantization/index.html").read_text("utf-8")
    assert "<math" in page
    assert '<html lang="ko"' in (tmp_path / "site/ko/guide/why/index.html").read_text("utf-8")
    assert "$" not in re.sub(r"<(code|script).*?</\1>", "", page, flags=re.DOTALL)
