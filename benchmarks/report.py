"""The tables: Markdown from measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rules
from benchmarks.cases import CASES

Row = Mapping[str, Any]

COLUMNS = (
    "",
    "n",
    "blocked s (x memcpy)",
    "lost s",
    "committed s",
    "durable s (x write)",
    "CPU s trainer / all",
    "restore warm s (x read)",
    "restore cold s (x read)",
    "memory MB",
    "files",
    "bytes",
    "flipped byte",
    "gives up",
)

NOTES = """\
Medians; the ratio of a column is the median of ratios to the bound taken in the same process just before.

- **n**: quiet saves, as many saves beside the training loop, then restores: 5, or what fits the time.
- **blocked**: the save call, slowest rank.
- **lost**: a window of short training steps with a save in it, until the save is done, less the same steps without one;
  negative is noise.
- **committed**: until `wait` returned on all ranks. **durable**: until a syncfs after that returned.
- **CPU**: user and system seconds, of the training processes until committed, and of all processes of the job until
  durable.
- **restore**: into memory not touched before; checked, outside the time, against what was saved. From host memory
  nothing is copied but what is small: pages are copied when they are first written to, which is outside the time.
- **memory**: peak of the machine's anonymous and shared pages during the first saves, above the state; on a disk only,
  since on /dev/shm the checkpoint itself is memory.
- **bytes**: of the checkpoint, in units of the state.
- **flipped byte**, in the middle of the largest file: noticed by an error, silent (wrong values) or unharmed; tried in
  the first place only.

Bounds are medians over all rows: memcpy and crc32c by one thread, a sequential write with fsync, a sequential read into
new memory. With several ranks each does its part at the same time."""


def render(meta: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The whole page."""
    parts = ["# Checkpoints of the same state by different systems", "", NOTES, ""]
    for case in CASES:
        for place in ("disk", "shm"):
            chosen = [row for row in rows if (row["case"], row["place"]) == (case, place) and "skipped" not in row]
            if chosen:
                parts += [f"## {CASES[case].title}, {PLACES[place]}", "", _bounds(chosen), "", table(chosen), ""]
    parts += ["## Made by", "", *(f"- {name}: {value}" for name, value in meta.items()), ""]
    return "\n".join(parts)


def publish(text: str, out: Path | None) -> None:
    """Print a page, and write it where there is a file for it."""
    print(text, end="")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


PLACES = {"disk": "on disk", "shm": "on /dev/shm"}


def table(rows: Iterable[Row]) -> str:
    """One case in one place."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Row) -> list[str]:
    """One row; a failure's reason stands where the last column is."""
    s = rules.summary(row)
    told = row.get("gives_up") or "-"
    if "error" in row:
        told = f"**no figures**: {one_line(row['error'])}"
    return [
        row.get("name", row["subject"]),
        str(s["n"] or "-"),
        _with_ratio(s["blocked"], s["blocked_ratio"]),
        seconds(s["lost"]),
        seconds(s["committed"]),
        _with_ratio(s["durable"], s["durable_ratio"]),
        f"{seconds(s['cpu'])} / {seconds(s['cpu_all'])}",
        _with_ratio(s["warm"], s["warm_ratio"]),
        _with_ratio(s["cold"], s["cold_ratio"]),
        "-" if s["memory"] is None else f"{s['memory'] / 1e6:.0f}",
        str(s["files"] or "-"),
        "-" if s["bytes_ratio"] is None else f"{s['bytes_ratio']:.3f}",
        s["flipped"] or "-",
        told,
    ]


def seconds(value: float | None) -> str:
    """Two significant digits or so, whatever the size."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.{2 if size >= 0.1 else 3}f}"


def one_line(text: str) -> str:
    """Fit for a table's cell."""
    return " ".join(text.replace("|", "/").split())[:160]


def _with_ratio(value: float | None, ratio: float | None) -> str:
    if value is None or ratio is None:
        return seconds(value)
    return f"{seconds(value)} ({ratio:.0f})" if ratio >= 100 else f"{seconds(value)} ({ratio:.2g})"


def _bounds(rows: Sequence[Row]) -> str:
    found = rules.bounds(rows)
    names = {
        "memcpy": "memcpy",
        "crc": "crc32c",
        "write": "write + fsync",
        "read": "warm read",
        "read_cold": "cold read",
    }
    known = [f"{name} {_fine(found[key])} s" for key, name in names.items() if found[key] is not None]
    return f"Bounds: {', '.join(known)}." if known else "No row came to an end."


def _fine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
