"""Files of a Hugging Face hub, through the ``huggingface_hub`` package and its cache."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict

from ._errors import missing_package, raised
from .exceptions import AccessError, InputNotFoundError, LorafmtError, NetworkError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Names under which libraries look for the adapter of a repository, in this order.
DEFAULT_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


class HubOptions(TypedDict, total=False):
    """What diffusers' ``load_lora_weights`` takes about a repository, under the same names.

    ``weight_name`` is the file and ``subfolder`` its folder, in a repository or in a local folder; ``revision`` a
    branch, a tag or a commit; ``token`` a token, or whether the stored one is sent; ``cache_dir`` another cache than
    the environment's; with ``local_files_only`` nothing but the cache is used.
    """

    weight_name: str | None
    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say something; unknown ones are a TypeError, as for every function."""
    for name in options:
        if name not in HubOptions.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
    # Without a token is something else than without a word about tokens.
    return {name: value for name, value in options.items() if value is not None and (value or name == "token")}


def fetch(repo: str, revision: str | None, path: str, options: dict[str, Any]) -> tuple[str, str, bool]:
    """A file from the cache or into it: its local path, its address, and whether all that belongs to it came along.

    That is an ``adapter_config.json`` beside it, or the knowledge that there is none.

    ``path`` is the file, or a folder that holds one adapter, or empty for the whole repository.

    Raises:
        InputNotFoundError: ``repo-not-found``, ``revision-not-found`` or ``not-found``.
        AccessError: ``gated-repo``, ``unauthorized`` or ``forbidden``.
        NetworkError: ``offline``, ``network`` or ``server-error``.
        UsageError: ``ambiguous-address`` if a folder holds several adapters.
    """
    try:
        import huggingface_hub as hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise missing_package("huggingface_hub", "reads files of a hub") from error

    revision, path = place(revision, path, options)
    at = address(repo, revision)
    common = {name: options[name] for name in ("token", "cache_dir", "local_files_only") if name in options}
    try:
        if PurePosixPath(path).suffix != ".safetensors":
            path = _one_of(_names(hub, repo, revision, common), path, at)
        local = _download(hub, repo, revision, path, common)
        complete = _beside(hub, repo, revision, path, common)
    except LorafmtError:
        raise
    except Exception as error:
        translated = _translated(error, repo, revision, path, common)
        if translated is None:
            raise
        raise translated from error
    return local, address(repo, revision, path), complete


def place(revision: str | None, path: str, options: dict[str, Any]) -> tuple[str | None, str]:
    """Revision and path of an address, as options say more of them."""
    parts = [path, options.get("subfolder") or "", options.get("weight_name") or ""]
    path = str(PurePosixPath(*[part for part in parts if part])) if any(parts) else ""
    return _agreed("revision", revision, options.get("revision")), path


def address(repo: str, revision: str | None, path: str = "") -> str:
    """The address of a repository, or of a path in it."""
    at = f"hf://{repo}" + (f"@{revision.replace('%', '%25').replace('/', '%2F')}" if revision else "")
    return f"{at}/{path}" if path else at


def _agreed(name: str, one: str | None, other: str | None) -> str | None:
    if one and other and one != other:
        message = f"the address and `{name}` name two: {one!r}, {other!r}"
        raise raised(UsageError, "invalid-argument", message, "name one")
    return one or other


def _download(hub: Any, repo: str, revision: str | None, path: str, common: dict[str, Any]) -> str:
    from ._lorafmt import __version__

    about = {"library_name": "lorafmt", "library_version": __version__}
    return str(hub.hf_hub_download(repo, path, revision=revision, **about, **common))


def _beside(hub: Any, repo: str, revision: str | None, path: str, common: dict[str, Any]) -> bool:
    """PEFT keeps the scale in a file of its own. Whether it came along, or is known not to be there."""
    config = str(PurePosixPath(path).with_name("adapter_config.json"))
    try:
        _download(hub, repo, revision, config, common)
    except hub.errors.LocalEntryNotFoundError:
        # Nobody could be asked; the cache may know that there is none.
        cached = hub.try_to_load_from_cache(repo, config, common.get("cache_dir"), revision)
        return cached is not None
    except hub.errors.EntryNotFoundError:
        pass
    return True


def _names(hub: Any, repo: str, revision: str | None, common: dict[str, Any]) -> list[str]:
    """All files of a repository, or of what the cache has of it where nothing else may be asked."""
    if not (common.get("local_files_only") or hub.constants.HF_HUB_OFFLINE):
        return list(hub.HfApi(token=common.get("token")).list_repo_files(repo, revision=revision))
    folder = hub.snapshot_download(repo, revision=revision, **{**common, "local_files_only": True})
    return [
        PurePosixPath(os.path.relpath(os.path.join(where, name), folder).replace(os.sep, "/")).as_posix()
        for where, _, names in os.walk(folder)
        for name in names
    ]


def _one_of(names: Iterable[str], folder: str, at: str) -> str:
    inside = [n for n in sorted(names) if n.endswith(".safetensors") and (not folder or n.startswith(f"{folder}/"))]
    prefix = f"{folder}/" if folder else ""
    for name in DEFAULT_NAMES:
        if prefix + name in inside:
            return prefix + name
    if len(inside) == 1:
        return inside[0]
    if not inside:
        raise raised(InputNotFoundError, "not-found", f"{at}: there is no .safetensors file", "check the path", at)
    shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    message = f"{at}: it holds {len(inside)} .safetensors files"
    raise raised(UsageError, "ambiguous-address", message, f"name one with `weight_name`: {shown}", at)


def _translated(
    error: Exception, repo: str, revision: str | None, path: str, common: dict[str, Any]
) -> LorafmtError | None:
    """The error in the words that the command line uses for the same; None for those that are no answer."""
    from huggingface_hub import errors

    at = f"hf://{repo}" + (f"@{revision}" if revision else "") + (f"/{path}" if path else "")
    login = "set `HF_TOKEN`, pass `token`, or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    offline = common.get("local_files_only") or isinstance(error, errors.OfflineModeIsEnabled)

    def made(kind: type[LorafmtError], code: str, message: str, hint: str) -> LorafmtError:
        return raised(kind, code, f"{at}: {message}", hint, at)

    if isinstance(error, errors.GatedRepoError):
        hint = f"accept its conditions on its web page, then {login}"
        return made(AccessError, "gated-repo", f"`{repo}` is gated, and this account has no access to it", hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"check the spelling; for a private repository {login}"
        return made(InputNotFoundError, "repo-not-found", f"the hub shows no repository `{repo}`", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"`{repo}` has no branch, tag or commit `{revision or 'main'}`"
        return made(InputNotFoundError, "revision-not-found", message, "check the spelling of the revision")
    if isinstance(error, errors.LocalEntryNotFoundError) or offline:
        cause = error.__cause__
        if offline or isinstance(cause, errors.OfflineModeIsEnabled) or _is_offline():
            hint = f"go online once, or fetch it first: `hf download {repo} {path}`"
            return made(NetworkError, "offline", "it is not in the cache, and nothing else may be asked", hint)
        return made(NetworkError, "network", f"the hub cannot be reached: {cause or error}", "check the connection")
    if isinstance(error, errors.EntryNotFoundError):
        message = f"`{repo}` has no `{path}` at `{revision or 'main'}`"
        return made(InputNotFoundError, "not-found", message, "check the spelling of the path in the repository")
    if status == 401:
        return made(AccessError, "unauthorized", "the hub asks for a token", login)
    if status == 403:
        return made(AccessError, "forbidden", "the hub refuses the file to this account", "use another token")
    if isinstance(error, errors.HfHubHTTPError):
        return made(NetworkError, "server-error", f"the hub failed: {error}", "wait a little and try again")
    if isinstance(error, errors.HFValidationError):
        return made(UsageError, "invalid-address", str(error), "a repository is called `user/name`")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
        return made(NetworkError, "network", f"the hub cannot be reached: {error}", "check the connection")
    return None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
