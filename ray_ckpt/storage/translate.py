"""Storage errors in our terms: which directory, which operation, what to do; never a credential."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from ray_ckpt.errors import ObjectMissingError, RayCkptError, StorageError
from ray_ckpt.storage.retry import GaveUpError, is_transient

HIDDEN = "***"
_STILL_FAILING = "still failing after {}: check the network and the storage service"

_REMEDIES = {
    errno.ENOSPC: "the file system is full: free space or keep fewer checkpoints",
    errno.EDQUOT: "the quota is used up: free space or keep fewer checkpoints",
    errno.EROFS: "the file system is mounted read-only: choose another directory or remount it",
    errno.ENOTDIR: "a part of this path is a file, not a directory: choose another directory",
    errno.EISDIR: "this path is a directory, an object was expected: choose another directory",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter directory",
}
_SECRET_KEY = re.compile(r"secret|token|passw|pwd|key|credential|sas|sig|auth|connection_string|cert", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@(?=[\w.\[])")
_SIGNED = r"x-amz-[a-z-]+|x-goog-[a-z-]+|sig|signature|access_token|token|awsaccesskeyid"
_SIGNATURE = re.compile(rf"(?i)([?&](?:{_SIGNED})=)[^&\s'\"]+")


def secrets_in(options: Mapping[str, Any]) -> Iterator[str]:
    """The strings among these storage options that must not be shown."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _texts(value.values()) if _SECRET_KEY.search(key) else secrets_in(value)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from secrets_in({key: item})
        elif _SECRET_KEY.search(key):
            yield from _texts([value])


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Each as it may appear in a text: as it is, and as in a URL."""
    for value in values:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if isinstance(text, str) and len(text) > 3:
            yield from {text, quote(text, safe=""), quote(text)}


def redacted(text: str, options: Mapping[str, Any]) -> str:
    """The text without credentials: those in the options, in URLs and in signed requests."""
    for secret in secrets_in(options):
        text = text.replace(secret, HIDDEN)
    return _SIGNATURE.sub(rf"\1{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))


def remedy(error: BaseException) -> str:
    """What to do about it."""
    if isinstance(error, PermissionError) or "Forbidden" in str(error):
        return "not permitted: give this user (or service account) the right to read, write and delete there"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return _REMEDIES[error.errno]
    if "DefaultCredentials" in type(error).__name__ or "NoCredentials" in type(error).__name__:
        return "no credentials were found: log in on this host or pass them in storage_options"
    if is_transient(error):
        return _STILL_FAILING.format("all retries")
    return "check the directory and the storage service"


def translated(
    error: Exception, url: str, operation: str, options: Mapping[str, Any], *, writes: bool = False
) -> RayCkptError:
    """The error to raise in its place; its cause is kept only where that shows no credential."""
    if isinstance(error, RayCkptError):
        return error
    if isinstance(error, GaveUpError):
        advice = _gave_up(error)
        error = error.error
    else:
        advice = remedy(error)
    text = str(error)
    shown = redacted(text, options)
    if not isinstance(error, FileNotFoundError):
        result = StorageError(f"{operation} in {url}: {advice} ({type(error).__name__}: {shown})")
    elif writes:
        result = StorageError(f"{operation} in {url}: the bucket or directory does not exist: create it")
    else:
        result = ObjectMissingError(f"{operation} in {url}: there is no such object")
    result.__cause__ = error if shown == text else None
    return result


def _gave_up(error: GaveUpError) -> str:
    tried = "1 try" if error.tries == 1 else f"{error.tries} tries"
    return _STILL_FAILING.format(f"{tried} in {error.seconds_s:.1f} s")
