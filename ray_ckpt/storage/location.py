"""Canonical URLs: one text for one place, whatever way it was written."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass

import fsspec

from ray_ckpt.errors import UsageError

KNOWN = "file://, memory://, gs://, s3://"

_ALIASES = {"local": "file", "gcs": "gs", "s3a": "s3", "s3n": "s3"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SLIPPED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/?([^/].*)?", re.DOTALL)
"""A scheme without its two slashes."""


@dataclass(frozen=True, slots=True)
class Location:
    """A directory: its scheme, its place in the terms of that scheme, and the URL of both."""

    scheme: str
    root: str

    @property
    def url(self) -> str:
        """The canonical URL, without a trailing slash."""
        return f"{self.scheme}://{self.root}"


def locate(url: str | os.PathLike[str]) -> Location:
    """Where a URL or path points to.

    Symbolic links are not followed: another host may have the same path behind another link. Raises
    `UsageError` for what is not one directory.
    """
    text = _text(url)
    if not text:
        raise UsageError("the checkpoint directory is an empty string: give a path or a URL")
    if "::" in text:
        raise UsageError(f"{text!r} chains file systems ('::'), which cannot be written safely: give one URL")
    match = _SCHEME.fullmatch(text)
    if match is None:
        _check_no_slip(text)
        return Location("file", os.path.abspath(text))
    scheme = _ALIASES.get(match[1].lower(), match[1].lower())
    rest = match[2]
    if "@" in rest and ":" in rest.partition("@")[0]:
        raise UsageError(f"this {scheme}:// URL contains credentials: pass them in storage_options instead")
    if scheme == "file":
        if not rest.startswith("/"):
            raise UsageError(f"{text!r} names no absolute path: write file:///path, or a plain path")
        return Location(scheme, os.path.normpath("/" + rest.lstrip("/")))
    root = posixpath.normpath("/" + rest).strip("/")
    if not root:
        raise UsageError(f"{text!r} names no bucket or directory: write {scheme}://name/directory")
    return Location(scheme, root)


def _text(url: object) -> str:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if isinstance(text, str):
        return text
    raise UsageError(f"the checkpoint directory must be a path or a URL (str or os.PathLike), found {url!r}")


def _check_no_slip(path: str) -> None:
    """Raises `UsageError` for "gs:/bucket"; a local path of that name can be written "./gs:/bucket"."""
    match = _SLIPPED.fullmatch(path)
    if match is None or match[1].lower() not in {*_ALIASES, *fsspec.available_protocols()}:
        return
    # What is before an "@" may be a secret.
    rest = "..." if "@" in path else (match[2] or "...")
    start = "file:///" if _ALIASES.get(match[1].lower(), match[1].lower()) == "file" else f"{match[1]}://"
    raise UsageError(f"{match[1]}: without // is no URL: did you mean {start}{rest}? A local path begins with / or ./")
