"""Build a corpus; the same as ``mot prepare``."""

import sys

from mot_megatron.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
