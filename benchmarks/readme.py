"""``python -m benchmarks.readme``: put the main figures of ``results/results.json`` into the README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import COLUMNS, Row, cells
from benchmarks.rows import ROOT

BEGIN = "<!-- the lines up to the next mark: python -m benchmarks.readme -->"
END = "<!-- end of python -m benchmarks.readme -->"
CASE, PLACE = "big", "disk"
SHOWN = (
    "",
    "blocked s (x memcpy)",
    "lost s",
    "durable s (x write)",
    "restore warm s (x read)",
    "flipped byte",
    "gives up",
)
RESULTS = ROOT / "benchmarks" / "results" / "results.json"


def block(meta: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The short table of one case, with what it was made by."""
    picked = [COLUMNS.index(name) for name in SHOWN]
    chosen = [row for row in rows if (row["case"], row["place"]) == (CASE, PLACE) and "skipped" not in row]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, chosen)]
    table = [f"| {' | '.join(line[i] for i in picked)} |" for line in lines]
    traced = f"{meta['date']}, {meta['CPU']}, {meta['memory']}, {meta['file system of disk']}; `{meta['command']}`"
    return "\n".join([BEGIN, "", *table, "", f"{traced}.", "", END])


def placed(readme: str, text: str) -> str:
    """The README with the block in its place. Raises ValueError where the marks are missing."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r}")
    return before + text + after


def main(readme: Path = ROOT / "README.md") -> None:
    """Rewrite the README."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    readme.write_text(placed(readme.read_text(), block(results["meta"], results["rows"])))


if __name__ == "__main__":
    main()
