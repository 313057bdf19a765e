"""`python -m rac_engine` is the `rac` command, for launchers that start modules."""

from __future__ import annotations

import sys

from rac_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
