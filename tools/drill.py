"""Kill, stop and damage training jobs, and check them; the same as ``mot drill``."""

import sys

from mot_megatron.cli.drill import main

if __name__ == "__main__":
    sys.exit(main())
