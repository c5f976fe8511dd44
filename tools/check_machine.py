"""Check a machine before training on it; the same as ``mot check-machine``."""

import sys

from mot_megatron.cli.check_machine import main

if __name__ == "__main__":
    sys.exit(main())
