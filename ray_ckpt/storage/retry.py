"""Retries of storage operations, in one place: what is worth another try, how often, when, and until when."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDoneError
from typing import Any, TypeVar

import tenacity

T = TypeVar("T")
logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""How long an operation may take with all its retries, unless ``storage_options`` say otherwise."""

SLOWEST = 1e6
"""Bytes a second: so much longer may one take that moves bytes."""

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
LONGEST_ASKED_S = 30.0
"""Of the wait that a service asks for: no single answer is to use up all of an operation's time."""
_LONG_S = 5.0
"""From then on the log warns of tries."""

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
    ("botocore", "FlexibleChecksumError"),  # changed on the way
    ("gcsfs", "ChecksumError"),
    ("requests", "RequestException"),
    ("urllib3", "HTTPError"),
}


class HangsError(TimeoutError):
    """A call has not come back in time. Nothing can end it: it may still do its work later."""


class GaveUpError(Exception):
    """The time or the tries are spent. ``error`` is what came of the last try that came back."""

    def __init__(self, error: Exception, tries: int, seconds_s: float) -> None:
        super().__init__(f"{tries} tries in {seconds_s:.1f} s")
        self.error = error
        self.tries = tries
        self.seconds_s = seconds_s


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later."""
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return True
    if any((c.__module__.partition(".")[0], c.__name__) in _CLASSES for c in type(error).__mro__):
        return True
    code = str(getattr(error, "code", ""))
    if code in _HTTP_CODES or (code == "401" and "Invalid Credentials" in str(error)):  # GCS: the token has expired
        return True
    if getattr(error, "retryable", False) is True:  # google.auth says so itself
        return True
    return isinstance(error, OSError) and error.errno in _ERRNOS


def asked_s(error: BaseException | None) -> float:
    """The seconds that the service asks to wait (``Retry-After``), 0 where it does not or the library hides it.

    s3fs keeps botocore's error as the cause; gcsfs drops the headers. A date in place of seconds is not heeded.
    """
    response = getattr(error, "response", None) or getattr(getattr(error, "__cause__", None), "response", None)
    try:
        seconds = float(response["ResponseMetadata"]["HTTPHeaders"]["retry-after"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return 0.0
    return min(seconds, LONGEST_ASKED_S) if seconds > 0 else 0.0


def deadline_s(timeout_s: float, nbytes: int) -> float:
    """How long an operation that moves so many bytes may take."""
    return timeout_s + nbytes / SLOWEST


def policy(what: str, attempts: int, timeout_s: float) -> dict[str, Any]:
    """The settings of `tenacity` that all retries share: jittered waits that grow, on top of what the service asks for,
    none of them past the deadline.
    """
    jittered = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)

    def wait(state: tenacity.RetryCallState) -> float:
        return asked_s(state.outcome.exception() if state.outcome else None) + jittered(state)

    def report(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        level = logging.WARNING if (state.seconds_since_start or 0.0) > _LONG_S else logging.INFO
        logger.log(level, "%s: %s, trying again", what, type(error).__name__)

    return {
        "retry": tenacity.retry_if_exception(is_transient),
        "wait": wait,
        "stop": tenacity.stop_after_attempt(attempts) | tenacity.stop_before_delay(timeout_s),
        "before_sleep": report,
        "reraise": True,
    }


def retrying(
    call: Callable[[], T], what: str, attempts: int, timeout_s: float, sleep: Callable[[float], None] = time.sleep
) -> T:
    """The call's result, tried up to ``attempts`` times and ``timeout_s`` in all.

    Raises:
        GaveUpError: no try succeeded.
        Exception: another try would not help; as it came.
    """
    began = time.monotonic()
    tries = 0
    last: Exception | None = None

    def once() -> T:
        nonlocal tries, last
        tries += 1
        try:
            return within(max(began + timeout_s - time.monotonic(), 0.0), call)
        except HangsError:
            raise
        except Exception as error:
            last = error
            raise

    try:
        return tenacity.Retrying(sleep=sleep, **policy(what, attempts, timeout_s))(once)
    except Exception as error:
        if not is_transient(error):
            raise
        raise GaveUpError(last or error, tries, time.monotonic() - began) from None


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """The call's result if it comes in time. A thread for each: what hangs in one must not keep others waiting.

    Raises:
        HangsError: it does not; the thread is left to itself.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="ray-ckpt-storage", daemon=True)
    thread.start()
    try:
        error = outcome.exception(timeout_s)
    except NotDoneError:
        raise HangsError(f"not done within {timeout_s:.1f} s") from None
    # It is at its end, but may still hold the buffer that it was given.
    thread.join()
    if error is not None:
        raise error
    return outcome.result()
