"""How long ranks wait for each other. Light to import: the start of every rank does."""

from __future__ import annotations

from datetime import timedelta

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in a collective, of any group, before it gives up.

Dead and stopped processes are noticed far sooner (see job/watch.py). What is left for this limit
is a main thread that is stuck while its process lives, and that looks like one that works: writing
a large checkpoint or compiling a kernel takes minutes, so it must not be short.
"""
