"""Files at any address that the ``fsspec`` package knows: ``s3://``, ``gs://``, ``https://`` and so on."""

from __future__ import annotations

import os
import posixpath
from typing import Any

from ._errors import missing_package, raised
from .exceptions import AccessError, FormatError, InputNotFoundError, LorafmtError, NetworkError

#: Packages that fsspec asks for by address; for others it names the package itself.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def fetch(url: str, folder: str) -> str:
    """Fetches a file into ``folder`` under its own name, an ``adapter_config.json`` beside it too; returns its path.

    Endpoints and credentials are those of fsspec's own settings and of the environment. The length is checked against
    the one that the server says.

    Raises:
        InputNotFoundError: ``not-found``.
        AccessError: ``forbidden``.
        NetworkError: ``network`` or ``corrupt-download``.
        MissingPackageError: ``missing-package``, naming what to install.
    """
    try:
        import fsspec
    except ImportError as error:
        raise missing_package("fsspec", "reads files by address") from error

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise missing_package(PACKAGES.get(scheme, scheme), f"reads `{scheme}://`") from error
    except ValueError as error:
        raise _known(FormatError, "invalid-address", url, f"`{scheme}://` is not known", "see fsspec's list") from error

    local = os.path.join(folder, posixpath.basename(path.rstrip("/")) or "adapter.safetensors")
    try:
        _copy(system, path, local, url)
        beside = posixpath.join(posixpath.dirname(path), "adapter_config.json")
        if scheme not in ("http", "https") and system.exists(beside):
            _copy(system, beside, os.path.join(folder, "adapter_config.json"), url)
    except LorafmtError:
        raise
    except FileNotFoundError as error:
        raise _known(InputNotFoundError, "not-found", url, "there is no such file", "check the address") from error
    except PermissionError as error:
        hint = "set the credentials that fsspec looks for, such as `AWS_PROFILE`"
        raise _known(AccessError, "forbidden", url, f"the server refuses: {error}", hint) from error
    except Exception as error:
        # What goes wrong on the way has a class of its own in every one of these packages.
        hint = "check the connection and the endpoint"
        raise _known(NetworkError, "network", url, f"cannot fetch it: {error}", hint) from error
    return local


def _copy(system: Any, path: str, local: str, url: str) -> None:
    size = system.info(path).get("size")
    system.get_file(path, local)
    found = os.path.getsize(local)
    if size is not None and found != size:
        message = f"{found} bytes arrived where {size} were promised"
        raise _known(NetworkError, "corrupt-download", url, message, "try again")


def _known(kind: type[LorafmtError], code: str, url: str, message: str, hint: str) -> LorafmtError:
    return raised(kind, code, f"{url}: {message}", hint, url)
