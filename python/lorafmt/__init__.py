"""LoRA adapter files of any dialect into any other, exactly and fast.

Importing this package imports neither torch nor numpy; functions that return tensors do when they are called.
"""

from __future__ import annotations

from ._lorafmt import __version__
from .adapter import Adapter, Module
from .api import check, convert, convert_state_dict, detect, diff, inspect, open, register_table
from .exceptions import (
    FileError,
    FormatError,
    InputNotFoundError,
    LorafmtError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from .reports import AdapterInfo, CheckReport, Detection, DiffReport, Report, Warning

__all__ = [
    "Adapter",
    "AdapterInfo",
    "CheckReport",
    "Detection",
    "DiffReport",
    "FileError",
    "FormatError",
    "InputNotFoundError",
    "LorafmtError",
    "Module",
    "OutputExistsError",
    "Report",
    "UnsupportedError",
    "UsageError",
    "Warning",
    "__version__",
    "check",
    "convert",
    "convert_state_dict",
    "detect",
    "diff",
    "inspect",
    "open",
    "register_table",
]
