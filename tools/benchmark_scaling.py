"""Count and forecast a step on many GPUs; the same as ``mot benchmark scaling``."""

import sys

from mot_megatron.cli.benchmark_scaling import main

if __name__ == "__main__":
    sys.exit(main())
