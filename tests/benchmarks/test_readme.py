"""The README's figures are those of the results."""

from __future__ import annotations

import json

import pytest

from benchmarks.readme import BEGIN, END, RESULTS, block, placed
from benchmarks.rows import ROOT


def test_the_readme_shows_what_was_measured() -> None:
    results = json.loads(RESULTS.read_text())
    readme = (ROOT / "README.md").read_text()
    assert placed(readme, block(results["meta"], results["rows"])) == readme, "run python -m benchmarks.readme"


def test_only_the_block_is_replaced() -> None:
    assert placed(f"a\n{BEGIN}\nold\n{END}\nb\n", f"{BEGIN}\nnew\n{END}") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(ValueError, match="needs the lines"):
        placed("nothing", "x")
