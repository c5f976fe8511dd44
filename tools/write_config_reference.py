"""Write docs/configuration.md from the fields of mot_megatron/config.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mot_megatron.config_reference import config_reference
from mot_megatron.files import write_atomically

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def main(arguments: list[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    write_atomically(PAGE, config_reference())
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
