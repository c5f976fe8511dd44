"""Make a new run from a trained model; the same as ``mot upcycle``."""

import sys

from mot_megatron.cli.upcycle import main

if __name__ == "__main__":
    sys.exit(main())
