"""What is measured of a checkpointing system: the few calls that its user would make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from benchmarks.cases import Case


class Subject(ABC):
    """One system in one mode. One object a process and rank; the harness times the calls, never the subject itself.

    In the order of the calls: ``start``, then any number of ``update``, ``save``, ``wait``, then ``close``; in a
    fresh process ``open_restore``, then any number of ``restore``, then ``close``.
    """

    name: ClassVar[str]
    """As in the table: "Orbax async, OCDBT"."""

    gives_up: ClassVar[str] = ""
    """What this mode does not do that others do, as in the table: "no fsync", "no checksums"."""

    cases: ClassVar[tuple[str, ...]] = ("big", "small", "workers", "hosts", "quick")

    started_at: float | None = None
    """`time.monotonic` just before `start` started processes or took memory for saving; memory counts from then.

    None, as by default, where that happens in the first `save`.
    """

    def __init__(self, case: Case, rank: int, directory: str) -> None:
        self.case = case
        self.rank = rank
        self.directory = directory

    @classmethod
    def launch(cls, case: Case, directory: str, worker: Callable[[int], None]) -> bool:
        """Run ``worker(rank)`` in ``case.world_size`` processes in the system's own way (a Ray Train job).

        False, as by default, where the harness shall start plain processes. Called in the parent process.
        """
        return False

    @classmethod
    def prepare(cls, case: Case, directory: str) -> dict[str, Any]:
        """Start in the parent process what the workers share (a Ray cluster, a rendezvous address).

        The result is pickled and passed to every worker's `configure`.
        """
        return {}

    @classmethod  # noqa: B027, optional
    def tear_down(cls) -> None:
        """End what `prepare` started."""

    def configure(self, shared: Mapping[str, Any]) -> None:  # noqa: B027, optional
        """Join what `prepare` started."""

    @abstractmethod
    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Make the training state from this rank's arrays, as the system's users hold it.

        ``arrays`` makes each value anew when it is asked for: it may be kept, and is nobody else's.
        """

    @abstractmethod
    def update(self, names: Sequence[str]) -> None:
        """A training step's work on these tensors: add 1 in place (or donated), done when this returns."""

    @abstractmethod
    def save(self, step: int) -> None:
        """What the training thread calls; it may go on when this returns."""

    @abstractmethod
    def wait(self) -> None:
        """Until the last save is complete and visible as the system means it, on all ranks."""

    @abstractmethod
    def files(self, step: int) -> str:
        """The file or directory, or glob, that holds the checkpoint of this step."""

    @abstractmethod
    def open_restore(self, step: int) -> None:
        """Everything that comes before reading: models built, targets made, graphs constructed."""

    def before_restore(self) -> None:  # noqa: B027, optional
        """What has to be done anew before each `restore` and is no part of it; not timed."""

    @abstractmethod
    def restore(self) -> Mapping[str, Any]:
        """Read the checkpoint into memory that was not touched before; this rank's tensors by name.

        The values take ``numpy.asarray``. Whatever the system verifies by its own recommended way, it verifies.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what this process holds."""
