"""Time how fast raw files become ids; the same as ``mot benchmark documents``."""

import sys

from mot_megatron.cli.benchmark_documents import main

if __name__ == "__main__":
    sys.exit(main())
