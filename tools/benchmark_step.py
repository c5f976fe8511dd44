"""Time whole training steps, also against another checkout; the same as ``mot benchmark step``."""

import sys

from mot_megatron.cli.benchmark_step import main

if __name__ == "__main__":
    sys.exit(main())
