"""Show what a finished run reached; the same as ``mot summary``."""

import sys

from mot_megatron.cli.summary import main

if __name__ == "__main__":
    sys.exit(main())
