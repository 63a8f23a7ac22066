"""The results as a table, a page and pictures.

Start at `write_report`. Reads nothing but `results.json`.
"""

from tinier.report.page import write_report
from tinier.report.table import markdown_table, table_rows

__all__ = ["markdown_table", "table_rows", "write_report"]
