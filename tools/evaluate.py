"""Measure a trained model's held-out loss; the same as ``mot evaluate``."""

import sys

from mot_megatron.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
