"""``python -m mot_megatron`` is ``mot``."""

import sys

from mot_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
