"""Write the table of docs/loading.md that says which preset goes where.

Run: python -m scripts.write_export_matrix
"""

import re
from pathlib import Path

from tinier.exporting import matrix, matrix_text

PAGE = Path(__file__).parent.parent / "docs" / "loading.md"
START, END = "<!-- export: start -->", "<!-- export: end -->"


def page_with_table(text: str) -> str:
    """The page with the table as it is now."""
    pattern = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), f"{PAGE} has no {START}"
    section = f"{START}\n{matrix_text(matrix())}\n{END}"
    return pattern.sub(lambda _: section, text)


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
