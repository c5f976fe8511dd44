"""Measure the memory of every rank; the same as ``mot memory``."""

import sys

from mot_megatron.cli.memory import main

if __name__ == "__main__":
    sys.exit(main())
