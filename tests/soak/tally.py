"""What a soak has counted, as the table at its end, and its story for those who look for the cause of a violation."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

_STORY = 60


@dataclass
class Tally:
    """Counts of one soak. ``kills``: strikes by what they hit; ``processes``: how many ended by them."""

    console: Console
    seed: int
    began: float = field(default_factory=time.monotonic)
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    restores: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    processes: int = 0
    waiting: int = 0
    committed: int = 0
    abandoned: int = 0
    verified: int = 0
    starts: int = 0
    failed_starts: int = 0
    runs: int = 0
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.story: deque[str] = deque(maxlen=_STORY)

    @property
    def seconds_s(self) -> float:
        """How long the soak has run."""
        return time.monotonic() - self.began

    def tell(self, text: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.seconds_s:7.1f} s  {text}")
        self.console.log(text, highlight=False, markup=False)

    def violated(self, text: str) -> None:
        """Something that must never be; the same again is not said again."""
        if text not in self.violations:
            self.violations.append(text)
            self.tell(f"VIOLATION: {text}")

    def progress(self) -> str:
        """One line."""
        return (
            f"{self.seconds_s / 60:.1f} min: {self.kills.total()} kills, {self.faults.total()} storage faults, "
            f"{self.committed} saves committed, {self.abandoned} abandoned, {self.restores.total()} restores, "
            f"{len(self.violations)} violations"
        )

    def table(self) -> Table:
        """All counts."""
        table = Table("what", "count", title=f"soak, seed {self.seed}, {self.seconds_s / 60:.1f} minutes")
        groups = {"kills": self.kills, "storage faults": self.faults, "restores": self.restores}
        for name, counts in groups.items():
            table.add_row(name, str(counts.total()), style="bold")
            for kind, count in sorted(counts.items()):
                table.add_row(f"  {kind}", str(count))
        rows = {
            "processes ended by kills": self.processes,
            "processes that waited for a killed one, killed by the launcher": self.waiting,
            "saves committed": self.committed,
            "saves abandoned": self.abandoned,
            "checkpoints read whole by the oracle": self.verified,
            "starts of the job": self.starts,
            "starts that were struck before all ranks had restored": self.failed_starts,
            "runs (directories)": self.runs,
        }
        for name, count in rows.items():
            table.add_row(name, str(count), style="bold")
        for kind, count in sorted(self.stops.items()):
            table.add_row(f"  job stopped by {kind}", str(count))
        table.add_row("violations", str(len(self.violations)), style="bold red" if self.violations else "bold green")
        return table
