"""Errors that the package itself raises, in the form of those of the native module."""

from __future__ import annotations

from .exceptions import LorafmtError, MissingPackageError


def raised(kind: type[LorafmtError], code: str, message: str, hint: str, path: str | None = None) -> LorafmtError:
    """An error with all its attributes; raise what is returned."""
    error = kind(message)
    error.code, error.hint, error.path = code, hint, path
    return error


def missing_package(name: str, purpose: str) -> LorafmtError:
    """A package that is not installed, and what for."""
    return raised(
        MissingPackageError,
        "missing-package",
        f"the package `{name}`, which {purpose}, is not installed",
        f"`pip install {name}`",
    )
