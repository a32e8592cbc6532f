"""Layouts and plans travel as plain values: equal on arrival, and small in memory."""

from __future__ import annotations

import pickle

from ray_ckpt.plan import make_plan
from ray_ckpt.types import Box, Layout, LeafSpec


def test_layouts_and_plans_arrive_as_they_were_sent() -> None:
    shape = (64, 4)
    whole = [LeafSpec(f"own/{i}", "float32", shape, (Box.whole(shape),), "numpy") for i in range(3)]
    parts = LeafSpec("parts", "bfloat16", shape, (Box((0, 0), (8, 4)), Box((8, 0), (56, 4))), "jax")
    layout = Layout((*whole, parts, LeafSpec("scalar", "int64", (), (Box((), ()),), "int")), '{"tree": 1}', "digest")
    plan = make_plan([layout]).ranks[0]
    assert plan.copies
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_leaves_of_one_form_share_it() -> None:
    leaves = tuple(LeafSpec(str(i), "float32", (3, 1000), (Box((i % 2, 0), (1, 1000)),), "numpy") for i in range(4))
    arrived = pickle.loads(pickle.dumps(Layout(leaves, "", ""))).leaves
    assert arrived == leaves
    assert arrived[0].boxes is arrived[2].boxes
    assert arrived[0].boxes is not arrived[1].boxes
