"""Timeout of collectives. Cheap to import, because every rank does so at startup."""

from __future__ import annotations

from datetime import timedelta

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in a collective of any group before it fails.

The watchdog detects dead and stopped processes much earlier (see job/watch.py). This limit covers
a main thread that is stuck in a live process. From outside that looks like slow work, such as
writing a large checkpoint or compiling a kernel, which may take minutes; so it must not be short.
"""
