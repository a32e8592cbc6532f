"""Many processes, or threads, that do one thing at the same moment."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from ray_ckpt.storage import Store

RACERS = 16
TIMEOUT_S = 120.0

Action = Callable[[Store, int], Any]
"""What a racer does: gets its own store and its number, returns something picklable."""


def race_threads(store: Store, action: Action, racers: int = RACERS) -> list[Any]:
    """The action's results from this many threads, by number. The store is shared."""
    barrier = threading.Barrier(racers)

    def run(number: int) -> Any:
        barrier.wait(TIMEOUT_S)
        return action(store, number)

    with ThreadPoolExecutor(racers) as pool:
        return list(pool.map(run, range(racers)))


def race_processes(store: Store, action: Action, racers: int = RACERS) -> list[Any]:
    """The action's results from this many processes, by number. ``action`` is a module's function.

    Each has its own pickled copy of the store, and has used it before the race starts, so that slow
    first connections do not spread the racers out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "gcsfs", "s3fs"])
    barrier = context.Barrier(racers)
    raced = []
    for number in range(racers):
        receiver, sender = context.Pipe(duplex=False)
        args = (pickle.dumps((store, action)), number, barrier, sender)
        process = context.Process(target=_racer, args=args, daemon=True)
        process.start()
        sender.close()
        raced.append((process, receiver))
    try:
        return [_received(receiver) for _, receiver in raced]
    finally:
        for process, _ in raced:
            process.join(TIMEOUT_S)


def _racer(pickled: bytes, number: int, barrier: threading.Barrier, sender: Connection) -> None:
    store, action = pickle.loads(pickled)
    try:
        store.list("")
        barrier.wait(TIMEOUT_S)
        sender.send(action(store, number))
    except Exception as error:
        barrier.abort()
        sender.send(RuntimeError(f"racer {number}: {type(error).__name__}: {error}"))


def _received(receiver: Connection) -> Any:
    if not receiver.poll(TIMEOUT_S):
        raise TimeoutError(f"a racer did not answer within {TIMEOUT_S:.0f} s")
    result = receiver.recv()
    if isinstance(result, Exception):
        raise result
    return result
