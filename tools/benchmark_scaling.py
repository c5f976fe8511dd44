"""Measure, count and forecast how training scales; the same as ``mot benchmark scaling``."""

import sys

from mot_megatron.cli.benchmark_scaling import main

if __name__ == "__main__":
    sys.exit(main())
