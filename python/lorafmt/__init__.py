"""LoRA adapter files of any dialect into any other, exactly and fast.

Importing this package imports neither torch nor numpy, and its own modules only when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import diffusers, exceptions, runtime, torch
    from ._batch import BatchReport, batch
    from ._checkpoints import FuseReport, UnfuseReport, extract, fuse, unfuse
    from ._expand import expand
    from ._lorafmt import __version__
    from ._report import LibraryReport, report
    from ._resize import normalize, resize
    from .adapter import Adapter, Module
    from .api import (
        check,
        compose,
        convert,
        convert_state_dict,
        detect,
        diff,
        inspect,
        open,
        register_table,
        scale,
        split,
    )
    from .base import Base
    from .exceptions import (
        AccessError,
        FileError,
        FormatError,
        InputNotFoundError,
        LorafmtError,
        MissingPackageError,
        NetworkError,
        OutputExistsError,
        UnsupportedError,
        UsageError,
    )
    from .reports import AdapterInfo, CheckReport, Detection, DiffReport, Report, Warning
    from .weights import Weights

#: Public name -> the module that has it.
_HOME = {
    "__version__": "_lorafmt",
    "AccessError": "exceptions",
    "Adapter": "adapter",
    "AdapterInfo": "reports",
    "Base": "base",
    "BatchReport": "_batch",
    "CheckReport": "reports",
    "Detection": "reports",
    "DiffReport": "reports",
    "FileError": "exceptions",
    "FormatError": "exceptions",
    "FuseReport": "_checkpoints",
    "InputNotFoundError": "exceptions",
    "LibraryReport": "_report",
    "LorafmtError": "exceptions",
    "MissingPackageError": "exceptions",
    "Module": "adapter",
    "NetworkError": "exceptions",
    "OutputExistsError": "exceptions",
    "Report": "reports",
    "UnfuseReport": "_checkpoints",
    "UnsupportedError": "exceptions",
    "UsageError": "exceptions",
    "Warning": "reports",
    "Weights": "weights",
    "batch": "_batch",
    "check": "api",
    "compose": "api",
    "convert": "api",
    "convert_state_dict": "api",
    "detect": "api",
    "diff": "api",
    "expand": "_expand",
    "extract": "_checkpoints",
    "fuse": "_checkpoints",
    "inspect": "api",
    "normalize": "_resize",
    "open": "api",
    "register_table": "api",
    "report": "_report",
    "resize": "_resize",
    "scale": "api",
    "split": "api",
    "unfuse": "_checkpoints",
}

__all__ = [
    "AccessError",
    "Adapter",
    "AdapterInfo",
    "Base",
    "BatchReport",
    "CheckReport",
    "Detection",
    "DiffReport",
    "FileError",
    "FormatError",
    "FuseReport",
    "InputNotFoundError",
    "LibraryReport",
    "LorafmtError",
    "MissingPackageError",
    "Module",
    "NetworkError",
    "OutputExistsError",
    "Report",
    "UnfuseReport",
    "UnsupportedError",
    "UsageError",
    "Warning",
    "Weights",
    "__version__",
    "batch",
    "check",
    "compose",
    "convert",
    "convert_state_dict",
    "detect",
    "diff",
    "diffusers",
    "exceptions",
    "expand",
    "extract",
    "fuse",
    "inspect",
    "normalize",
    "open",
    "register_table",
    "report",
    "resize",
    "runtime",
    "scale",
    "split",
    "torch",
    "unfuse",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is not None:
        value = getattr(import_module(f".{home}", __name__), name)
    elif name in __all__:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
