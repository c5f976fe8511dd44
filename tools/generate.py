"""Continue a prompt with a trained model; the same as ``mot generate``."""

import sys

from mot_megatron.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
