"""Inspect and convert checkpoints; the same as ``mot checkpoint``."""

import sys

from mot_megatron.cli.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
