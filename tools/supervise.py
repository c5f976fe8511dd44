"""Start training, and start it again after a failure; the same as ``mot supervise``."""

import sys

from mot_megatron.cli.supervise import main

if __name__ == "__main__":
    sys.exit(main())
