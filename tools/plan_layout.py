"""List the layouts that fit in memory; the same as ``mot plan``."""

import sys

from mot_megatron.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
