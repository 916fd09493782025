"""Exceptions: one base, and subclasses that also are the builtin a caller would catch."""

from __future__ import annotations

import json
import re


class LorafmtError(Exception):
    """Base of all errors of lorafmt.

    Attributes:
        code: stable kebab-case name, listed in the documentation.
        hint: the option or command that helps.
        path: the file it is about, or None.
        key: the key it is about (one that the file really has), or None.
    """

    code: str = "error"
    hint: str | None = None
    path: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else self.code
        return f"{text}\nhint: {self.hint}" if self.hint else text


class FormatError(LorafmtError, ValueError):
    """The bytes or names of an input are not what they should be."""


class UnsupportedError(LorafmtError, NotImplementedError):
    """Well formed, but the conversion does not exist: a kind the target cannot hold, for example."""


class UsageError(LorafmtError, ValueError):
    """The call itself makes no sense."""


class FileError(LorafmtError, OSError):
    """The operating system could not read or write a file."""


class InputNotFoundError(FileError, FileNotFoundError):
    """The input does not exist."""


class OutputExistsError(FileError, FileExistsError):
    """The output exists already and ``overwrite`` was not given."""


class AccessError(FileError, PermissionError):
    """A server refuses the file: a gated repository, a missing or wrong token."""


class NetworkError(FileError, ConnectionError):
    """A server cannot be reached or fails, or the file is not in the cache and looking elsewhere is forbidden."""


class MissingPackageError(UnsupportedError, ImportError):
    """A package is needed that is not installed; the hint names it."""


_KINDS: dict[str, type[LorafmtError]] = {
    "NotFound": InputNotFoundError,
    "Exists": OutputExistsError,
    "Io": FileError,
    "Access": AccessError,
    "Network": NetworkError,
    "Unsupported": UnsupportedError,
    "Usage": UsageError,
    "Format": FormatError,
}


def _from_native(kind: str, message: str, document: str) -> LorafmtError:
    """Makes the exception of a native error from the error object of the public JSON."""
    fields = json.loads(document)
    error = _KINDS[kind](message)
    error.code, error.hint, error.path, error.key = (fields[name] for name in ("code", "hint", "path", "key"))
    # The hints speak of the command line; say them in the words of the functions.
    hint = (error.hint or "").replace("`--force`", "`overwrite=True`").replace("`--table FILE`", "`register_table`")
    error.hint = re.sub(r"--(\w+) ([\w.-]+)", r'\1="\2"', hint).replace("from=", "from_=")
    return error
