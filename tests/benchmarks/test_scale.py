"""The benchmark of scale on a few hosts: the real actor, whose saves are committed to a real directory."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from benchmarks import scale
from benchmarks.scale_hosts import layouts


def test_a_row_is_of_saves_that_were_committed() -> None:
    row = asyncio.run(scale.measure(3, 30, idle_s=0.2))
    assert (row.hosts, row.entries) == (3, 30)
    measured = dataclasses.asdict(row)
    assert all(
        measured[name] > 0 for name in ("start_s", "start_cpu_s", "save_cpu_s", "nbytes", "told_s", "peak_nbytes")
    )
    # Each host tells at least that its snapshot is sealed and that its shards are done.
    assert row.calls >= 2 * 3


def test_what_does_not_come_in_time_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "LIMIT_S", 0.0)
    with pytest.raises(TimeoutError, match="3 of 3 hosts still wait for the plan"):
        asyncio.run(scale.measure(3, 30, idle_s=0.2))


@pytest.mark.parametrize(("hosts", "entries"), [(1, 1), (3, 30), (5, 100)])
def test_every_entry_is_one_host_s(hosts: int, entries: int) -> None:
    described = layouts(hosts, entries)
    assert len(described) == hosts
    pieces = [(leaf.name, box) for layout in described for leaf in layout.leaves for box in leaf.boxes]
    assert len(pieces) == len(set(pieces)) == entries
