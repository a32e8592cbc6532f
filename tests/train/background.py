"""A fit beside the test that watches it and takes its hosts away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

import ray
from ray.train import Result

from tests.system.waiting import eventually

T = TypeVar("T")


@contextmanager
def fitting(fit: Callable[[], Result]) -> Iterator[Future[Result]]:
    """The call in a daemon thread. If it has not ended when the block does, Ray Train's controller is killed.

    That is so where the test has failed: the run would take the hosts of later tests.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(fit())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        yield future
    finally:
        if not future.done():
            _kill_controllers()
            wait([future], 60)


def while_fitting(future: Future[Result], condition: Callable[[], T], what: str, timeout_s: float = 120.0) -> T:
    """`eventually`, which ends with the fit's own error, or an `AssertionError`, if the fit has ended before."""

    def met() -> T:
        ended = future.done()
        value = condition()
        assert value or not ended, f"the fit ended before this: {what}; {future.result()}"
        return value

    return eventually(met, what, timeout_s)


def _kill_controllers() -> None:
    for actor in ray._private.state.actors().values():
        if actor["ActorClassName"] == "TrainController" and actor["State"] == "ALIVE":
            with contextlib.suppress(ProcessLookupError):
                os.kill(actor["Pid"], signal.SIGKILL)
