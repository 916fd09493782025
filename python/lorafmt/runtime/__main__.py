"""``python -m lorafmt.runtime``: which path computes on CUDA, and why."""

from __future__ import annotations

import sys


def main() -> int:
    """Prints the line."""
    from .library import status

    print(status())
    return 0


if __name__ == "__main__":
    sys.exit(main())
