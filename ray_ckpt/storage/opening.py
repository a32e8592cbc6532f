"""From a URL to the Store behind it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import fsspec

from ray_ckpt.errors import MissingExtraError, UnsafeStoreError, UsageError
from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.generic import GenericBackend
from ray_ckpt.storage.local import LocalBackend
from ray_ckpt.storage.location import KNOWN, Location, locate
from ray_ckpt.storage.memory import MemoryBackend
from ray_ckpt.storage.retry import TIMEOUT_S
from ray_ckpt.storage.store import BackedStore

Options = Mapping[str, Any]

TIMEOUT = "timeout_s"
"""The one storage option that is ours."""


def open_store(
    url: str | os.PathLike[str],
    *,
    storage_options: Options | None = None,
    single_coordinator: bool = False,
) -> Store:
    """The store for a directory. Nothing is read or written yet, see `Store.check`.

    ``storage_options`` go to the fsspec file system (gcsfs, s3fs, ...), but for ``timeout_s``, which is for any
    store: how long an operation may take with all its retries, in seconds (120), see `Store`. A server that is silent
    for a quarter of that is asked again. ``single_coordinator`` admits stores without exclusive creation: you promise
    that no second coordinator ever uses the directory.

    Raises `UsageError` (not a URL, unknown scheme, no time), `MissingExtraError` (a package is not installed) or
    `UnsafeStoreError`.
    """
    location = locate(url)
    options = dict(storage_options or {})
    timeout_s = _timeout_s(options)
    backend = _backend(location, {k: v for k, v in options.items() if k != TIMEOUT}, timeout_s, single_coordinator)
    rebuild = (_reopen, (location.url, options, single_coordinator))
    return BackedStore(location.url, backend, options, rebuild, timeout_s=timeout_s)


def _timeout_s(options: Options) -> float:
    found = options.get(TIMEOUT, TIMEOUT_S)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise UsageError(f"{TIMEOUT} in storage_options must be a positive number of seconds, found {found!r}")
    return float(found)


def _reopen(url: str, options: Options, single_coordinator: bool) -> Store:
    return open_store(url, storage_options=options, single_coordinator=single_coordinator)


def _backend(location: Location, options: dict[str, Any], timeout_s: float, single_coordinator: bool) -> Backend:
    exclusive: dict[str, Callable[[], Backend]] = {
        "file": lambda: LocalBackend(location.root),
        "memory": lambda: MemoryBackend(location.root),
        "gs": lambda: _gcs(location.root, options, timeout_s),
        "s3": lambda: _s3(location.root, options, timeout_s),
    }
    if location.scheme in exclusive:
        return exclusive[location.scheme]()
    _require_implementation(location.scheme)
    if not single_coordinator:
        raise UnsafeStoreError(
            f"{location.url}: exclusive creation is unproven on {location.scheme}://, so two coordinators"
            f" could damage each other's checkpoints. Use one of {KNOWN}, or pass single_coordinator=True"
            " if no second job, nor a restart of this one that overlaps with it, ever uses the directory"
        )
    return GenericBackend(location.url, options, timeout_s)


def _gcs(root: str, options: Options, timeout_s: float) -> Backend:
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gs:// needs the package gcsfs: pip install gcsfs") from error
    from ray_ckpt.storage.gcs import GcsBackend

    return GcsBackend(root, options, timeout_s)


def _s3(root: str, options: Options, timeout_s: float) -> Backend:
    try:
        import s3fs  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("s3:// needs the package s3fs: pip install ray_ckpt[s3]") from error
    from ray_ckpt.storage.s3 import S3Backend

    return S3Backend(root, options, timeout_s)


def _require_implementation(scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UsageError(
            f"unknown scheme {scheme}://: expected one of {KNOWN}, or, with single_coordinator=True, another"
            " that fsspec knows (fsspec.available_protocols())"
        ) from None
    except ImportError as error:
        raise MissingExtraError(f"{scheme}:// needs another package: {error}") from error
