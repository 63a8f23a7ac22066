"""The results as a table, a page and pictures.

Start at `write_report`. Reads nothing but `results.json`.
"""

from tinier.report.html import Run, write_html
from tinier.report.page import write_report
from tinier.report.table import markdown_table, table_rows

__all__ = ["Run", "markdown_table", "table_rows", "write_html", "write_report"]
