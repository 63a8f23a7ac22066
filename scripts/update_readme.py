"""Paste the table and the picture of a finished run into README.md.

Run: python -m scripts.update_readme runs/demo
"""

import re
import shutil
import sys
from pathlib import Path

from tinier.report import load_results, markdown_table
from tinier.report.page import choices_text, footnotes

ROOT = Path(__file__).parent.parent
START, END = "<!-- demo: start -->", "<!-- demo: end -->"


def demo_section(run: Path) -> str:
    results = load_results(run)
    environment = results["environment"]
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
        f"Measured by `make demo` in {results['seconds'] / 60:.1f} minutes on "
        f"{environment.get('gpu') or environment['cpu']} with {environment['cpu_cores']} cores: "
        f"Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; seed {results['seed']}. Lengths, repeats and hashes are in "
        "[benchmarks/results](benchmarks/results).",
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    run = Path(sys.argv[1])
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), f"README.md has no {START}"
    section = demo_section(run)
    readme.write_text(pattern.sub(lambda _: section, text), encoding="utf-8")
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in ("pareto-size.svg", "pareto-throughput.svg"):
        shutil.copyfile(run / name, images / name)
    print(f"wrote {readme} and {images}")


if __name__ == "__main__":
    main()
