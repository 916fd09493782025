"""``python -m lorafmt.runtime``: what of the runtime is a command.

python -m lorafmt.runtime status
python -m lorafmt.runtime quantize MODEL -o OUT [--rank 32] [--no-modulation] [--force]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..exceptions import LorafmtError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lorafmt.runtime", description="quantized models with adapters")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="which path computes on CUDA, and why")
    quantize = commands.add_parser("quantize", help="write a 16-bit FLUX.1 transformer in Nunchaku's int4 layout")
    quantize.add_argument("model", help="a file or folder of weights in diffusers' names")
    quantize.add_argument("-o", "--output", required=True, help="the file to write")
    quantize.add_argument("--rank", type=int, default=32, help="of the 16-bit branch, a multiple of 16 (32)")
    quantize.add_argument("--no-modulation", action="store_true", help="leave modulation layers in 16 bits")
    quantize.add_argument("--force", action="store_true", help="replace an output that exists")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0 done, 2 an error."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "status":
            from .library import status

            print(status())
            return 0
        from .writing import quantize_checkpoint

        written = quantize_checkpoint(
            given.model,
            given.output,
            rank=given.rank,
            modulation=not given.no_modulation,
            overwrite=given.force,
            progress=_show if sys.stderr.isatty() else None,
        )
    except LorafmtError as error:
        print(f"error: {error} [{error.code}]", file=sys.stderr)
        return 2
    print(written)
    return 0


def _show(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done} of {total} layers", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
