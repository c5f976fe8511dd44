"""Show what a corpus contains; the same as ``mot inspect``."""

import sys

from mot_megatron.cli.inspect import main

if __name__ == "__main__":
    sys.exit(main())
