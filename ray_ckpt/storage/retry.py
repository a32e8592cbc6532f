"""Retries of storage operations, in one place: what is worth another try, how often and when."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0

_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,  # s3fs: SlowDown, ServiceUnavailable, 409 of a conditional write
    errno.EINTR,
    errno.EIO,  # s3fs: every code it does not know, ConditionalRequestConflict among them
    errno.ESTALE,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: InternalError
}
_HTTP_CODES = {"408", "409", "429", "500", "502", "503", "504"}
# By name, so that none of these packages has to be installed, or imported before it is used.
_CLASSES = {
    ("aiohttp", "ClientError"),
    ("botocore", "HTTPClientError"),
    ("botocore", "ConnectionError"),
    ("requests", "RequestException"),
    ("urllib3", "HTTPError"),
}


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later."""
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return True
    if any((c.__module__.partition(".")[0], c.__name__) in _CLASSES for c in type(error).__mro__):
        return True
    if str(getattr(error, "code", "")) in _HTTP_CODES:
        return True
    return isinstance(error, OSError) and error.errno in _ERRNOS


def retrying(call: Callable[[], T], what: str, attempts: int, sleep: Callable[[float], None] = time.sleep) -> T:
    """The call's result, tried up to ``attempts`` times with growing, jittered waits between.

    Raises the last error as it came.
    """

    def report(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.info("%s: %s, trying again", what, type(error).__name__)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        stop=tenacity.stop_after_attempt(attempts),
        sleep=sleep,
        before_sleep=report,
        reraise=True,
    )(call)
