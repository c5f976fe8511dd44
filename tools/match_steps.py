"""Match the steps of runs against a baseline; the same as ``mot match``."""

import sys

from mot_megatron.cli.match import main

if __name__ == "__main__":
    sys.exit(main())
