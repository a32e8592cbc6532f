"""Sees what a store is asked to read."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_ckpt.storage import Store


@dataclass
class Watch:
    """Every `Store.read_into` of one store: path, first byte, size, and the memory it went to."""

    reads: list[tuple[str, int, int]] = field(default_factory=list)
    buffers: list[np.ndarray[Any, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that were asked for in all."""
        return sum(nbytes for _, _, nbytes in self.reads)


def watch(store: Store) -> Watch:
    """Note all reads of this store from now on."""
    seen = Watch()
    lock = threading.Lock()
    inner = store.read_into

    def read_into(path: str, start: int, buffer: memoryview) -> None:
        with lock:
            seen.reads.append((path, start, buffer.nbytes))
            seen.buffers.append(np.frombuffer(buffer, np.uint8))
        inner(path, start, buffer)

    store.read_into = read_into  # type: ignore[method-assign]
    return seen
