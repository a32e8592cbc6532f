"""``python -m benchmarks.run``: measure every subject in every case and place, and write the tables and the plot."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import machine, report
from benchmarks.cases import CASES
from benchmarks.plot import draw
from benchmarks.rows import LIMIT_S, PHASES, ROOT, Row, measure_row
from benchmarks.rules import summary
from benchmarks.subjects import SUBJECTS
from benchmarks.task import Task

CASE_NAMES = ("big", "small", "workers")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Results:
    """``results.json`` of a folder, and what is made from it; written after every row."""

    def __init__(self, folder: Path, meta: dict[str, str] | None = None, *, resume: bool = False) -> None:
        self._folder = folder
        self._path = folder / "results.json"
        found: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.rows: list[Row] = found.get("rows", [])
        old: dict[str, str] = found.get("meta", {})
        self.meta = {**old, **(meta or {})}
        if resume and old and meta:
            # Rows of several commands stand in one table.
            self.meta |= {name: f"{old[name]}; {meta[name]}" for name in ("date", "command", "commit")}

    def has(self, *key: str) -> bool:
        """Whether this (place, case, subject) is there and did not fail."""
        return any(_key(row) == key and "error" not in row for row in self.rows)

    def slower_than(self, limit_s: float, case: str, subject: str) -> Row:
        """Name and reason for a row that took longer in another place; {} if there is none."""
        for row in self.rows:
            if (row["case"], row["subject"]) == (case, subject) and row.get("seconds", 0.0) > limit_s:
                reason = f"not run here: took {row['seconds']:.0f} s on {row['place']}"
                return {"name": row.get("name", subject), "error": reason}
        return {}

    def put(self, row: Row, order: Sequence[tuple[str, ...]]) -> None:
        """Add it in its place of the order, instead of an older one."""
        rows = {_key(old): old for old in self.rows} | {_key(row): _short(row)}
        last = len(order)
        self.rows = sorted(rows.values(), key=lambda r: order.index(_key(r)) if _key(r) in order else last)
        self.write()

    def write(self) -> None:
        """The JSON, one row a line, and the table."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps({**row, "summary": rounded(summary(row))}) for row in self.rows)
        self._path.write_text(f'{{"meta": {json.dumps(self.meta, indent=1)},\n"rows": [\n{lines}\n]}}\n')
        (self._folder / "table.md").write_text(report.render(self.meta, self.rows))

    def draw(self) -> None:
        """The plot."""
        draw(self.rows, self._folder / "field.png")


@app.command()
def run(
    cases: Annotated[str, typer.Option(help=f"of {','.join(CASES)}")] = ",".join(CASE_NAMES),
    subjects: Annotated[str, typer.Option(help=f"of {','.join(SUBJECTS)}")] = ",".join(SUBJECTS),
    where: Annotated[str, typer.Option(help="disk, shm or both")] = "disk,shm",
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    repeats: Annotated[int, typer.Option(min=1, help="of everything that is quick enough")] = 5,
    budget: Annotated[float, typer.Option(help="seconds for a row's quiet saves, and for busy ones")] = 40.0,
    slow: Annotated[float, typer.Option(help="seconds; a row that took longer is not run in another place")] = 150.0,
    limit: Annotated[float, typer.Option(help="seconds after which a row is given up")] = LIMIT_S,
    out: Annotated[Path, typer.Option(help="folder of the results")] = ROOT / "benchmarks" / "results",
    resume: Annotated[bool, typer.Option("--resume", help="keep rows that are there and did not fail")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="write table and plot from the results")] = False,
) -> None:
    """Measure ray_ckpt and its peers on the same state, beside the bounds of the machine."""
    console = Console()
    # However it is ended: out through every ``finally``, so that no process and no folder is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if report_only:
        results = Results(out)
        results.write()
        results.draw()
        return
    places = {name: {"disk": str(disk), "shm": "/dev/shm"}[name] for name in _of(where, ("disk", "shm"))}
    disk.mkdir(parents=True, exist_ok=True)
    order = [(p, c, s) for c in _of(cases, tuple(CASES)) for p in places for s in _of(subjects, tuple(SUBJECTS))]
    results = Results(out, machine.describe(places), resume=resume)
    if not resume:
        results.rows = [row for row in results.rows if _key(row) not in order]
    began = time.monotonic()
    for number, (place, case, subject) in enumerate(order, 1):
        if resume and results.has(place, case, subject):
            continue
        root = Path(places[place], f"bench-{case}-{subject}")
        shutil.rmtree(root, ignore_errors=True)
        started = time.monotonic()
        task = Task("saving", subject, case, place, str(root), "", repeats=repeats, budget_s=budget)
        if before := results.slower_than(slow, case, subject):
            row = {**task.key, "nbytes": task.case.nbytes, **before}
        else:
            # What a flipped byte does is no matter of the place.
            row = measure_row(task, PHASES if place == next(iter(places)) else PHASES[:-1], limit)
        row["seconds"] = round(time.monotonic() - started, 1)
        results.put(row, order)
        minutes = (time.monotonic() - began) / 60
        console.print(
            f"[dim]{minutes:5.1f} min {number}/{len(order)}[/] {place} {case} [bold]{subject}[/]: {_told(row)}"
        )
    results.draw()
    console.print(f"written to {out}")


def _told(row: Row) -> str:
    if "skipped" in row:
        return "[dim]no such case[/]"
    if "error" in row:
        return f"[red]{report.one_line(row['error'])}[/]"
    found = summary(row)
    shown = (f"{name} {report.seconds(found[name])}" for name in ("blocked", "lost", "durable", "warm"))
    return f"{', '.join(shown)} s [dim](took {row['seconds']:.0f} s)[/]"


def _of(text: str, known: tuple[str, ...]) -> list[str]:
    """A list of the command line, checked. Raises `typer.BadParameter`."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for part in found:
        # A class of one's own, "package.module:Class", can be measured too.
        if part not in known and ":" not in part:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(known)}")
    return found


def _key(row: Row) -> tuple[str, ...]:
    return row["place"], row["case"], row["subject"]


def _short(row: Row) -> Row:
    """Without what a subject said, and rounded: the file is kept in the repository."""
    found: Row = rounded({name: value for name, value in row.items() if name != "said"})
    return found


def rounded(value: Any) -> Any:
    """Floats to five significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    app()
