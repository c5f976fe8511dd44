"""Time one layer; the same as ``mot benchmark layer``."""

import sys

from mot_megatron.cli.benchmark_layer import main

if __name__ == "__main__":
    sys.exit(main())
