"""Who is there: the newest report of every host, and the workers in them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ray_ckpt.protocol.messages import HostReport, Nodes, SegmentInfo, WorkerReport
from ray_ckpt.protocol.pace import spread_s

Save = tuple[int, int]
_Of = tuple[int, Save, str]


def _of(segment: SegmentInfo) -> _Of:
    return segment.rank, segment.save, segment.directory


@dataclass(slots=True)
class Host:
    """One host as last heard of, at ``seen`` (seconds)."""

    report: HostReport
    seen: float


class Roster:
    """Level-triggered: a newer report replaces all that an older one said.

    ``stepped`` is when a worker's own word last came in: what is known of the loops' steps is as old as that. ``nodes``
    is what Ray says. ``changed`` rises whenever another snapshot is in a host's memory than before, or a host is gone.
    ``directory``: only snapshots of this one count.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.worker_hosts: dict[str, str] = {}
        self.stepped = float("-inf")
        self.nodes = Nodes()
        self.changed = 0
        self.directory = ""
        self._left_out: frozenset[str] = frozenset()
        self._workers: dict[str, WorkerReport] = {}
        self._sequences: dict[str, int] = {}
        self._segments: dict[_Of, dict[str, SegmentInfo]] = {}

    def update(self, report: HostReport, now: float) -> bool:
        """Take a report in; False if it is older than what is known.

        An agent's new incarnation starts its sequence again; its old incarnation is gone for good, so
        whichever incarnation is heard of first after the other wins only by being new.
        """
        known = self.report(report.host)
        if known is not None:
            same = known.incarnation == report.incarnation
            if (same and report.sequence <= known.sequence) or (not same and report.incarnation < known.incarnation):
                return False
            self._forget(known)
        if known is None or known.segments != report.segments:
            self.changed += 1
        self.leave_out(self._left_out - {report.host})
        self.hosts[report.host] = Host(report, now)
        # Of two of one step, the one that a save is made of.
        for segment in sorted(report.segments, key=lambda s: s.trigger != "memory"):
            self._segments.setdefault(_of(segment), {})[report.host] = segment
        for worker in report.workers:
            if worker.sequence > self._sequences.get(worker.worker, -1):
                self._sequences[worker.worker] = worker.sequence
                self.stepped = now
            self._workers[worker.worker] = worker
            self.worker_hosts[worker.worker] = report.host
        return True

    def _forget(self, report: HostReport) -> None:
        """What only an older report of a host said."""
        for segment in report.segments:
            key = _of(segment)
            held = self._segments.get(key, {})
            held.pop(report.host, None)
            if not held:
                self._segments.pop(key, None)
        for worker in report.workers:
            if self.worker_hosts.get(worker.worker) == report.host:
                self._workers.pop(worker.worker, None)

    def forget(self, before: float, keep: Collection[str]) -> list[str]:
        """Drop the hosts not heard of since ``before``, but those of the workers to ``keep``; their ids."""
        kept = {self.worker_hosts.get(worker) for worker in keep}
        gone = [name for name, host in self.hosts.items() if host.seen < before and name not in kept]
        self.changed += len(gone)
        for name in gone:
            report = self.hosts.pop(name).report
            self._forget(report)
            for worker in report.workers:
                if self.worker_hosts.get(worker.worker) == name:
                    del self.worker_hosts[worker.worker]
                    self._sequences.pop(worker.worker, None)
        return gone

    def report(self, host: str) -> HostReport | None:
        """The newest report of one host."""
        known = self.hosts.get(host)
        return known.report if known is not None else None

    def workers(self) -> Iterator[tuple[str, WorkerReport]]:
        """(host, report) of every worker anyone has reported."""
        for host in self.hosts.values():
            for worker in host.report.workers:
                yield host.report.host, worker

    def worker(self, worker: str) -> WorkerReport | None:
        """The newest report of one worker."""
        return self._workers.get(worker)

    def told(self, nodes: Nodes) -> bool:
        """Take in what Ray says of its nodes; whether it is anything new."""
        new = nodes != self.nodes
        self.changed += new
        self.nodes = nodes
        return new

    def lost(self, host: str) -> bool:
        """Whether Ray says that a host is dead: then it never comes back under this id."""
        return host in self.nodes.dead

    def leave_out(self, hosts: frozenset[str]) -> None:
        """Nobody counts on the snapshots of these hosts, until they are heard of."""
        self.changed += hosts != self._left_out
        self._left_out = hosts

    def can_tell(self, host: str) -> bool:
        """Whether a host's snapshots can be counted on, as far as is known."""
        return not self.lost(host) and host not in self._left_out

    def dead(self, worker: str) -> bool:
        """Whether the worker's process is gone: its own host says so, or that is gone itself."""
        where = self.worker_hosts.get(worker, "")
        host = self.hosts.get(where)
        return self.lost(where) or (host is not None and worker in host.report.dead)

    def silent(self, worker: str, before: float) -> bool:
        """Whether the worker's host has not been heard of since ``before``."""
        host = self.hosts.get(self.worker_hosts.get(worker, ""))
        return host is None or self.host_silent(host, before)

    def host_silent(self, host: Host, before: float) -> bool:
        """Whether a host has not been heard of since ``before``; where hosts are many, each speaks more seldom."""
        return host.seen < before - spread_s(len(self.hosts))

    def host_name(self, worker: str) -> str:
        """A name people know for the worker's host."""
        return self.name(self.worker_hosts.get(worker, ""))

    def name(self, host: str) -> str:
        """A name people know for a host; its id where nothing has been heard of it."""
        known = self.hosts.get(host)
        return (known.report.name or known.report.host) if known else host or "an unknown host"

    def snapshots(self) -> Iterator[tuple[int, Save, dict[str, SegmentInfo]]]:
        """(rank, save, snapshot by host) of all that lies in the memory of hosts."""
        for (rank, save, directory), held in self._segments.items():
            if directory == self.directory:
                yield rank, save, held

    def segment(self, worker: str, rank: int, save: Save) -> SegmentInfo | None:
        """The sealed snapshot of a rank for a save, wherever it lies (its own host first)."""
        held = self._segments.get((rank, save, self.directory))
        if held is None:
            return None
        return held.get(self.worker_hosts.get(worker, "")) or next(iter(held.values()))
