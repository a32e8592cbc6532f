"""Which nodes go, from what Ray says of draining ones and of slices."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from ray_ckpt.coordinator.leaving import SLICE_LABEL, leaving_nodes
from ray_ckpt.protocol.messages import Leaving

NODES = [
    {"NodeID": "a0", "Labels": {SLICE_LABEL: "slice-a"}},
    {"NodeID": "a1", "Labels": {SLICE_LABEL: "slice-a"}},
    {"NodeID": "b0", "Labels": {SLICE_LABEL: "slice-b"}},
    {"NodeID": "head", "Labels": {}},
    {"NodeID": "plain", "Labels": None},
]


@pytest.fixture
def drains(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What Ray says, by node: the deadline in milliseconds."""
    found: dict[str, int] = {}

    def nodes() -> list[dict[str, Any]]:
        return NODES

    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: found)
    monkeypatch.setattr(ray, "nodes", nodes)
    return found


def test_no_node_goes(drains: dict[str, int]) -> None:
    assert leaving_nodes() == {}


def test_the_hosts_of_a_slice_go_together(drains: dict[str, int]) -> None:
    drains["a1"] = 0
    assert leaving_nodes() == {
        "a0": Leaving("lies in TPU slice slice-a, of which a host is being drained by Ray", drained=False),
        "a1": Leaving("is being drained by Ray"),
    }


@pytest.mark.parametrize("node", ["head", "plain", "gone"])
def test_hosts_without_a_slice_go_alone(drains: dict[str, int], node: str) -> None:
    deadline = time.time() + 25
    drains[node] = int(deadline * 1000)
    at = time.strftime("%H:%M:%S", time.localtime(int(deadline * 1000) / 1000))
    assert leaving_nodes() == {node: Leaving(f"is being drained by Ray and ends at {at}")}
