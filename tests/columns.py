"""The width of printed lines, without what the temporary folder of a test adds to them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TEMPORARY = re.compile(r"/\S*?/pytest-\d+/(popen-gw\d+/)?")
"""Folder of a run of pytest; longer by a folder if tests run in several processes."""


def widest(lines: Iterable[str]) -> int:
    """Return the length of the longest line, with /tmp/ as the temporary folder."""
    return max(len(_TEMPORARY.sub("/tmp/", line)) for line in lines)
