"""Train the arms of a comparison and report; the same as ``mot compare``."""

import sys

from mot_megatron.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
