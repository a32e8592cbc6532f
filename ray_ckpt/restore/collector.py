"""Python's cyclic garbage collector, kept off while the records of a checkpoint's tensors are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run the block, or decorated function, without collections in this process.

    The records of a restore are many, live to its end and have no cycles: looking for some as they are made costs
    a third of all the time. Only for blocks that compute, not for such as wait: others' garbage waits too. Where
    blocks of several threads overlap, the first that ends lets collections run again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
