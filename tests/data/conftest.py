"""Disables Hypothesis's deadline of 200 ms per example for the property tests of this folder."""

from hypothesis import settings

# A machine shared with other work would exceed it at random.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
