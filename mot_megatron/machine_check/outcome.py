"""What a check found: a verdict, what was seen, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["PASS", "FAIL", "SLOW", "SKIPPED"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check."""

    status: Status
    """PASS; FAIL: something is wrong or does not run; SLOW: right, but slower than it should be;
    SKIPPED: not run, for the reason in ``seen``."""
    seen: str
    """What was seen, in one line."""
    advice: str = ""
    """What to do about it, in one line; empty if there is nothing to do."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What was measured, for JSON."""
