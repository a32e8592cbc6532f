"""Whether a process on this host still runs, and the host itself since then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same number.

    ``started`` is in clock ticks since boot; 0 if the process is not there.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process with this number now."""
        return cls(pid, _stat(pid)[1])

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        state, started = _stat(self.pid)
        return state not in ("", "Z", "X") and started == self.started


def _stat(pid: int) -> tuple[str, int]:
    """(state, start time) from ``/proc/<pid>/stat`` (proc(5), fields 3 and 22); empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    # The command in field 2 may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def boot_id() -> bytes:
    """What tells this run of the machine from others, 16 bytes; zeros where the kernel does not say."""
    global _boot
    if _boot is None:
        try:
            _boot = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        except (OSError, ValueError):
            _boot = bytes(16)
    return _boot


_boot: bytes | None = None
