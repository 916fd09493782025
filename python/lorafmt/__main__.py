"""``python -m lorafmt`` and the console script: the same program as the ``lorafmt`` binary."""

from __future__ import annotations

import os
import signal
import sys

from ._lorafmt import run


def main() -> int:
    """Runs the command line and returns its exit code."""
    # The native program handles Ctrl-C itself: it removes what it was writing and exits with 130.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # `quantize` and `batch --engine ray` start Python again, and want this very one.
    os.environ.setdefault("LORAFMT_PYTHON", sys.executable)
    return run(["lorafmt", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
