"""Property tests of this folder run without hypothesis' limit of 200 ms per example."""

from hypothesis import settings

# A machine shared with other work exceeds it at random.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
