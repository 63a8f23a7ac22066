"""What MkDocs does to each page: formulas become MathML, which browsers draw by themselves, and a link to a
file of the repository that is no page becomes its text and its path."""

import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
_DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_INLINE = re.compile(r"\$(\S(?:[^$\n]*\S)?)\$")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs' event. page: has the path of its source inside docs/."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path.startswith("docs/"):
            return match[0]
        label = match[1].strip("`")
        return f"`{path}`" if label == path else f"{match[1]} (`{path}`)"

    return _with_formulas(_LINK.sub(link, markdown))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """MkDocs' event. Korean pages say that they are Korean: screen readers and search engines go by it."""
    if not page.file.src_uri.startswith("ko/"):
        return output
    return output.replace('<html lang="en"', '<html lang="ko"', 1)


def _with_formulas(markdown: str) -> str:
    parts = _CODE.split(markdown)
    for i in range(0, len(parts), 2):  # what is not code
        text = _DISPLAYED.sub(lambda m: convert(m[1].strip(), display="block"), parts[i])
        parts[i] = _INLINE.sub(lambda m: convert(m[1]), text)
    return "".join(parts)
