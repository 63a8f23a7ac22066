"""Text for calibration, training and measuring: from a file, the Hub or the built-in sample to
token windows.

Start at `load_parts` (sources.py) and `token_windows` (windows.py).
"""

from tinier.text.generated import written_windows
from tinier.text.sources import (
    BUILTIN,
    Document,
    Text,
    TextParts,
    documents_of,
    load_calibration,
    load_documents,
    load_part,
    load_parts,
    read_text,
    text_parts,
)
from tinier.text.windows import shortfall, tensor_sha256, token_windows

__all__ = [
    "BUILTIN",
    "Document",
    "Text",
    "TextParts",
    "documents_of",
    "load_calibration",
    "load_documents",
    "load_part",
    "load_parts",
    "read_text",
    "shortfall",
    "tensor_sha256",
    "text_parts",
    "token_windows",
    "written_windows",
]
