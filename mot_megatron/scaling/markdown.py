"""Markdown pages that a report writes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

_WIDTH = 120
_WHOLE = ("|", "#", "!", "<")
"""Beginnings of lines that are not broken: rows of tables, headings, images. Neither are those of
blocks of code."""


def wrapped(lines: Iterable[str]) -> str:
    """Return lines as the text of a page; long sentences are broken at spaces."""
    found: list[str] = []
    verbatim = False
    for line in lines:
        is_fence = line.startswith("```")
        verbatim ^= is_fence
        if verbatim or is_fence or line.startswith(_WHOLE) or not line:
            found.append(line)
        else:
            indent = "  " if line.startswith("- ") else ""
            found += textwrap.wrap(
                line,
                _WIDTH,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(found)
