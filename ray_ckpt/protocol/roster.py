"""Who is there: the newest report of every host, and the workers in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ckpt.protocol.messages import HostReport, SegmentInfo, WorkerReport


@dataclass(slots=True)
class Host:
    """One host as last heard of, at ``seen`` (seconds)."""

    report: HostReport
    seen: float


class Roster:
    """Level-triggered: a newer report replaces all that an older one said."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.worker_hosts: dict[str, str] = {}

    def update(self, report: HostReport, now: float) -> bool:
        """Take a report in; False if it is older than what is known.

        An agent's new incarnation starts its sequence again; its old incarnation is gone for good, so
        whichever incarnation is heard of first after the other wins only by being new.
        """
        known = self.hosts.get(report.host)
        if known is not None:
            same = known.report.incarnation == report.incarnation
            if (same and report.sequence <= known.report.sequence) or (
                not same and report.incarnation < known.report.incarnation
            ):
                return False
        self.hosts[report.host] = Host(report, now)
        for worker in report.workers:
            self.worker_hosts[worker.worker] = report.host
        return True

    def workers(self) -> Iterator[tuple[str, WorkerReport]]:
        """(host, report) of every worker anyone has reported."""
        for host in self.hosts.values():
            for worker in host.report.workers:
                yield host.report.host, worker

    def worker(self, worker: str) -> WorkerReport | None:
        """The newest report of one worker."""
        host = self.hosts.get(self.worker_hosts.get(worker, ""))
        if host is None:
            return None
        return next((w for w in host.report.workers if w.worker == worker), None)

    def dead(self, worker: str) -> bool:
        """Whether the worker's own host says that its process is gone."""
        host = self.hosts.get(self.worker_hosts.get(worker, ""))
        return host is not None and worker in host.report.dead

    def silent(self, worker: str, before: float) -> bool:
        """Whether the worker's host has not been heard of since ``before``."""
        host = self.hosts.get(self.worker_hosts.get(worker, ""))
        return host is None or host.seen < before

    def host_name(self, worker: str) -> str:
        """A name people know for the worker's host."""
        host = self.hosts.get(self.worker_hosts.get(worker, ""))
        return (host.report.name or host.report.host) if host else "an unknown host"

    def segment(self, worker: str, rank: int, save: tuple[int, int]) -> SegmentInfo | None:
        """The sealed snapshot of a rank for a save, wherever it lies (its own host first)."""
        first = self.hosts.get(self.worker_hosts.get(worker, ""))
        for host in [first, *self.hosts.values()] if first else self.hosts.values():
            for segment in host.report.segments:
                if segment.rank == rank and segment.save == save:
                    return segment
        return None
