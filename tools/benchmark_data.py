"""Time the data path; the same as ``mot benchmark data``."""

import sys

from mot_megatron.cli.benchmark_data import main

if __name__ == "__main__":
    sys.exit(main())
