"""From a pyarrow file system and a path on it, which is what Ray Train holds, to a URL and options of fsspec."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_ckpt.errors import UsageError

_ALIASES = {"local": "file", "gcs": "gs", "s3a": "s3"}
_OF_ONE_PROCESS = ("asynchronous", "loop")
"""Options of an fsspec object that mean nothing in another process."""


@dataclass(frozen=True, slots=True)
class Place:
    """A directory: its URL, and the options with which fsspec reaches it (they may hold secrets, so no repr)."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


def place_of(filesystem: Any, path: str) -> Place:
    """The place of ``path`` on a `pyarrow.fs.FileSystem`.

    Local disks, S3, GCS, parts of these (`SubTreeFileSystem`), and file systems of fsspec in pyarrow's wrapper.

    Raises:
        UsageError: a kind of file system or a setting of it that fsspec has nothing for; names it.
    """
    kind = type(filesystem).__name__
    known: dict[str, Callable[[Any, str], Place]] = {
        "LocalFileSystem": lambda _, path: Place(f"file://{posixpath.abspath(path)}"),
        "SubTreeFileSystem": lambda fs, path: place_of(fs.base_fs, posixpath.join(fs.base_path, path.lstrip("/"))),
        "S3FileSystem": _s3,
        "GcsFileSystem": _gcs,
        "PyFileSystem": _wrapped,
    }
    if kind not in known:
        raise UsageError(
            f"storage on a {kind} at {path!r}: expected a local disk, S3, GCS or a file system of fsspec in "
            "pyarrow.fs.FSSpecHandler, whose URLs are known"
        )
    return known[kind](filesystem, path)


def _s3(filesystem: Any, path: str) -> Place:
    """s3fs' options: https://s3fs.readthedocs.io/en/latest/api.html#s3fs.core.S3FileSystem."""
    settings = _settings(filesystem, path)
    _check_unset(settings, path, "role_arn")
    if (settings.get("proxy_options") or {}).get("host"):
        raise _unknown(path, "proxy_options")
    client = {"region_name": settings["region"]} if settings.get("region") else {}
    options = {
        "key": settings.get("access_key"),
        "secret": settings.get("secret_key"),
        "token": settings.get("session_token"),
        "anon": settings.get("anonymous"),
        "endpoint_url": _endpoint(settings),
        "client_kwargs": client,
    }
    return Place(f"s3://{path.strip('/')}", {key: value for key, value in options.items() if value})


def _gcs(filesystem: Any, path: str) -> Place:
    """Gcsfs' options: https://gcsfs.readthedocs.io/en/latest/api.html#gcsfs.core.GCSFileSystem."""
    settings = _settings(filesystem, path)
    # A token that was made once ends within the hour, and the coordinator goes on.
    _check_unset(settings, path, "access_token", "target_service_account")
    options = {
        "token": "anon" if settings.get("anonymous") else None,
        "project": settings.get("project_id"),
        "endpoint_url": _endpoint(settings),
    }
    return Place(f"gs://{path.strip('/')}", {key: value for key, value in options.items() if value})


def _wrapped(filesystem: Any, path: str) -> Place:
    """A file system of fsspec: it knows its own options."""
    inner = getattr(filesystem.handler, "fs", None)
    if inner is None or not hasattr(inner, "storage_options"):
        raise UsageError(
            f"storage on a pyarrow file system of {type(filesystem.handler).__name__} at {path!r}: only those in "
            "pyarrow.fs.FSSpecHandler have URLs"
        )
    if type(inner).__name__ == "DirFileSystem":
        return _of_fsspec(inner.fs, posixpath.join(inner.path, path.lstrip("/")))
    return _of_fsspec(inner, path)


def _of_fsspec(inner: Any, path: str) -> Place:
    if inner.storage_args:
        raise UsageError(
            f"storage on a {type(inner).__name__} that was made with positional arguments, at {path!r}: make it with "
            "keyword arguments, which can be handed on"
        )
    protocol = inner.protocol if isinstance(inner.protocol, str) else inner.protocol[0]
    scheme = _ALIASES.get(protocol, protocol)
    options = {key: value for key, value in inner.storage_options.items() if key not in _OF_ONE_PROCESS}
    if scheme == "file":
        return Place(f"file://{posixpath.abspath(path)}")
    return Place(f"{scheme}://{path.strip('/')}", options)


def _settings(filesystem: Any, path: str) -> Mapping[str, Any]:
    """The arguments that made it, as its own pickle holds them: pyarrow has no other way to read them."""
    _, arguments = filesystem.__reduce__()[:2]
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        return arguments[0]
    raise UsageError(
        f"storage on a {type(filesystem).__name__} at {path!r}, of a version of pyarrow that hides its settings"
    )


def _endpoint(settings: Mapping[str, Any]) -> str | None:
    found = settings.get("endpoint_override")
    if not found or "://" in found:
        return found or None
    return f"{settings.get('scheme') or 'https'}://{found}"


def _check_unset(settings: Mapping[str, Any], path: str, *names: str) -> None:
    for name in names:
        if settings.get(name):
            raise _unknown(path, name)


def _unknown(path: str, setting: str) -> UsageError:
    return UsageError(f"storage at {path!r} was opened with {setting}, which cannot be handed on to fsspec")
