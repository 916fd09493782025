"""What ``lorafmt quantize`` runs: the runtime's :func:`lorafmt.runtime.quantize_checkpoint`, as a command."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from ._errors import missing_package, raised
from .exceptions import FileError, LorafmtError, OutputExistsError


def main(text: str) -> int:
    """Runs it with options as JSON and returns the exit code. Says what came of it as all commands do."""
    options: dict[str, Any] = json.loads(text)
    try:
        done = _run(options)
    except LorafmtError as error:
        _complain(error, options["json"])
        return 2
    except OSError as error:
        path = os.fsdecode(error.filename) if error.filename else None
        hint = "check the path, permissions and free space"
        _complain(raised(FileError, "io", error.strerror or str(error), hint, path), options["json"])
        return 2
    except KeyboardInterrupt:
        return 130
    if options["json"]:
        print(json.dumps(done, indent=2))
    elif not options["quiet"]:
        target = done["target"]
        verb = "would write" if done["dry_run"] else "wrote"
        size = f"{target['bytes'] / 1e6:.1f} MB"
        print(
            f"{verb} {target['path']}: {done['layers']} layers in 4 bits, rank {done['rank']}, {size}", file=sys.stderr
        )
    return 0


def _run(options: dict[str, Any]) -> dict[str, Any]:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise missing_package("torch", "quantizes weights") from error
    from .runtime import writing
    from .runtime.tensorfile import TensorFile

    maxima = None if options["maxima"] is None else dict(TensorFile(options["maxima"]))
    model, rank, alpha, modulation = (options[name] for name in ("model", "rank", "alpha", "modulation"))
    promises, _ = writing.promised(model, rank, maxima, alpha, modulation, None)
    layers = sum(name.endswith(".qweight") for name in promises)
    if os.path.exists(options["out"]) and not options["overwrite"]:
        out = options["out"]
        raise raised(OutputExistsError, "output-exists", f"{out} exists", "name another output, or add `--force`", out)
    if options["dry_run"]:
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape, _ in promises.values())
    else:
        written = writing.quantize_checkpoint(
            model,
            options["out"],
            rank=rank,
            maxima=maxima,
            alpha=alpha,
            modulation=modulation,
            overwrite=options["overwrite"],
            progress=_show if options["progress"] and sys.stderr.isatty() else None,
        )
        size = os.path.getsize(written)
    target = {"path": options["out"], "dialect": "nunchaku", "bytes": size}
    source = {"path": model, "family": "flux1"}
    said = {"source": source, "target": target, "layers": layers, "rank": rank, "smoothed": len(maxima or {})}
    return {"schema": 1, **said, "dry_run": options["dry_run"]}


def _complain(error: LorafmtError, as_json: bool) -> None:
    message = str(error.args[0]) if error.args else error.code
    if as_json:
        said = {"code": error.code, "message": message, "path": error.path, "key": error.key, "hint": error.hint}
        print(json.dumps({"schema": 1, "error": said}))
        return
    where = f"{error.path}: " if error.path and error.path not in message else ""
    print(f"error: {where}{message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _show(done: int, total: int) -> None:
    print(f"\r{done} of {total} layers", end="\n" if done == total else "", file=sys.stderr, flush=True)
