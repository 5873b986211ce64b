"""``python -m turbo`` is the command ``turbo``."""

from __future__ import annotations

import sys

from turbo.cli import main

if __name__ == "__main__":
    sys.exit(main())
