"""Paste the table and the picture of a finished run into README.md, and keep its results.

Run: python -m scripts.update_readme runs/demo
"""

import re
import shutil
import sys
from pathlib import Path

from tinier.recipe import RunResults, load_results
from tinier.report import markdown_table
from tinier.report.page import choices_text, footnotes

ROOT = Path(__file__).parent.parent
START, END = "<!-- demo: start -->", "<!-- demo: end -->"


def demo_section(run: Path) -> str:
    results = load_results(run)
    environment = results.environment
    versions = environment["versions"]
    lines = [
        START,
        markdown_table(results),
        "",
        *[f"{note}  " for note in footnotes(results)],
        "",
        *[f"- {choice}" for choice in choices_text(results)],
        "",
        "![Quality against size](docs/images/pareto-size.svg)",
        "",
        f"Measured by `make demo` in {results.seconds / 60:.1f} minutes on "
        f"{environment.get('gpu') or environment['cpu']} with {environment['cpu_cores']} cores: "
        f"Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; seed {results.seed}. The whole report: "
        f"[{result_name(results)}.md](benchmarks/results/{result_name(results)}.md). The built-in text is "
        "the language reference that comes with Python, so another Python gives other figures.",
        END,
    ]
    return "\n".join(lines)


def result_name(results: RunResults) -> str:
    """Theme, hardware, date: `demo_amd-epyc-2-cores_2026-11-23`."""
    environment = results.environment
    hardware = f"{environment.get('gpu') or environment['cpu']} {environment['cpu_cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return f"demo_{slug}_{results.created[:10]}"


def main() -> None:
    run = Path(sys.argv[1])
    readmes = [ROOT / "README.md", ROOT / "README.ko.md"]
    pattern = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    section = demo_section(run)
    for readme in readmes:
        text = readme.read_text(encoding="utf-8")
        assert pattern.search(text), f"{readme} has no {START}"
        readme.write_text(pattern.sub(lambda _: section, text), encoding="utf-8")
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in ("pareto-size.svg", "pareto-throughput.svg"):
        shutil.copyfile(run / name, images / name)
    results = load_results(run)
    kept = ROOT / "benchmarks" / "results" / result_name(results)
    page = (run / "report.md").read_text(encoding="utf-8")
    page = page.replace("](pareto-", "](../../docs/images/pareto-")
    kept.with_suffix(".md").write_text(page, encoding="utf-8")
    shutil.copyfile(run / "results.json", kept.with_suffix(".json"))
    print(f"wrote {readmes}, {images} and {kept}")


if __name__ == "__main__":
    main()
