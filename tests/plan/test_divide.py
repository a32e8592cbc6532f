"""Who writes what: every element once, by a rank that holds it, evenly."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.plan import divide, make_plan, not_tf_readable
from ray_ckpt.types import Box, Layout, LeafSpec, Plan, RankPlan

MIB = 1 << 20


def leaf(name: str, shape: tuple[int, ...], *boxes: Box, dtype: str = "float32", kind: str = "numpy") -> LeafSpec:
    return LeafSpec(name, dtype, shape, boxes or (Box.whole(shape),), kind)


def layout(*leaves: LeafSpec) -> Layout:
    return Layout(leaves, "{}", repr(leaves))


def loads(plan: Plan) -> list[int]:
    return [rank.fixed_nbytes for rank in plan.ranks]


def check(plan: Plan, layouts: list[Layout]) -> None:
    """The invariants of any plan, counted element by element."""
    counts: dict[str, np.ndarray] = {}
    boxes: dict[str, list[Box]] = {}
    for rank, mine in zip(plan.ranks, layouts, strict=True):
        start = 0
        firsts = {writer.first for writer in rank.writers}
        for index, copy in enumerate(rank.copies):
            if index in firsts and copy.start != -1:
                start += -start % 4096
            spec = mine.leaves[copy.leaf]
            held = spec.boxes if 0 not in spec.shape else (Box.whole(spec.shape),)
            assert any(box == copy.box or box.intersect(copy.box) == copy.box for box in held)
            counts.setdefault(spec.name, np.zeros(spec.shape, int))[copy.box.slices] += 1
            boxes.setdefault(spec.name, []).append(copy.box)
            if spec.dtype == "string":
                assert (copy.start, copy.nbytes) == (-1, -1)
            else:
                itemsize = {"float32": 4, "float16": 2, "int8": 1}[spec.dtype]
                assert (copy.start, copy.nbytes) == (start, copy.box.size * itemsize)
                start += copy.nbytes
        assert rank.fixed_nbytes == start
        strings = [copy.start == -1 for copy in rank.copies]
        assert strings == sorted(strings)
        check_writers(rank)
    names = {spec.name for mine in layouts for spec in mine.leaves}
    assert set(counts) == names == {tensor.name for tensor in plan.tensors}
    assert all((count == 1).all() for count in counts.values())
    assert {tensor.name: sorted(tensor.boxes) for tensor in plan.tensors} == {
        name: sorted(found) for name, found in boxes.items()
    }
    bases = [rank.writer_base for rank in plan.ranks]
    assert bases == [sum(len(rank.writers) for rank in plan.ranks[:i]) for i in range(len(bases))]
    assert plan.num_writers == sum(len(rank.writers) for rank in plan.ranks)
    assert all(rank.num_writers == plan.num_writers and rank.plan_id == plan.plan_id for rank in plan.ranks)


def check_writers(rank: RankPlan) -> None:
    assert [i for writer in rank.writers for i in range(writer.first, writer.stop)] == list(range(len(rank.copies)))
    assert all(writer.first < writer.stop for writer in rank.writers)


def partition(rng: random.Random, box: Box, cuts: int) -> list[Box]:
    """Disjoint boxes that cover ``box``."""
    boxes = [box]
    for _ in range(cuts):
        victim = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(victim.shape)) if victim.shape else None
        if axis is None or victim.shape[axis] < 2:
            boxes.append(victim)
            continue
        at = rng.randrange(1, victim.shape[axis])
        for start, n in ((0, at), (at, victim.shape[axis] - at)):
            offset = (*victim.offset[:axis], victim.offset[axis] + start, *victim.offset[axis + 1 :])
            boxes.append(Box(offset, (*victim.shape[:axis], n, *victim.shape[axis + 1 :])))
    return boxes


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 2000))
def test_any_state_is_covered_once(seed: int, world_size: int, cut_nbytes: int) -> None:
    rng = random.Random(seed)
    held: list[list[LeafSpec]] = [[] for _ in range(world_size)]
    for number in range(rng.randint(1, 8)):
        shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(0, 3)))
        dtype = rng.choice(["float32", "float16", "int8", "string"])
        whole = Box.whole(shape)
        boxes = partition(rng, whole, rng.randint(0, 4)) if whole.size > 1 else [whole]
        owners: list[list[Box]] = [[] for _ in held]
        for box in boxes:
            for rank in rng.sample(range(world_size), rng.randint(1, world_size)):
                owners[rank].append(box)
        for rank, mine in enumerate(owners):
            if mine:
                held[rank].insert(rng.randint(0, len(held[rank])), leaf(f"t{number}", shape, *mine, dtype=dtype))
    layouts = [layout(*leaves) for leaves in held]
    plan = make_plan(layouts, cut_nbytes=cut_nbytes, min_writer_nbytes=64)
    check(plan, layouts)
    assert plan == make_plan(layouts, cut_nbytes=cut_nbytes, min_writer_nbytes=64)
    assert set(not_tf_readable(plan)) <= {t.name for t in plan.tensors if t.dtype in ("float16", "string")}


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=30),
    st.integers(0, 300),
    st.integers(2, 16),
)
def test_data_parallel_hosts_write_equal_parts(big_mib: list[int], small: int, world_size: int) -> None:
    leaves = [leaf(f"big{i}", (n * 256, 1024)) for i, n in enumerate(big_mib)]
    leaves += [leaf(f"small{i}", (8, 8)) for i in range(small)]
    layouts = [layout(*leaves)] * world_size
    plan = make_plan(layouts, cut_nbytes=MIB)
    total = sum(math.prod(spec.shape) * 4 for spec in leaves)
    assert sum(loads(plan)) == total
    if total >= 16 * MIB * world_size:
        assert max(loads(plan)) <= 1.1 * total / world_size
        assert min(loads(plan)) >= 0.9 * total / world_size


def test_whole_leaves_are_balanced_before_any_is_cut() -> None:
    plan = make_plan([layout(*(leaf(f"w{i}", (32 * 256, 1024)) for i in range(24)))] * 4)
    assert loads(plan) == [6 * 32 * MIB] * 4
    assert all(len(tensor.boxes) == 1 for tensor in plan.tensors)


def test_one_large_leaf_is_cut_for_all_its_holders() -> None:
    plan = make_plan([layout(leaf("w", (64 * 256, 1024)))] * 4)
    assert loads(plan) == [16 * MIB] * 4
    assert plan.tensors[0].boxes == tuple(Box((i * 4096, 0), (4096, 1024)) for i in range(4))


def test_the_first_dimension_may_be_too_short_to_cut() -> None:
    plan = make_plan([layout(leaf("w", (2, 64 * 256, 512)))] * 4)
    assert loads(plan) == [16 * MIB] * 4
    assert {box.shape for box in plan.tensors[0].boxes} == {(2, 4096, 512)}


@pytest.mark.parametrize("dtype", ["float16", "uint32", "float8_e5m2"])
def test_what_tensorflow_cannot_read_in_slices_is_not_cut(dtype: str) -> None:
    plan = make_plan([layout(leaf("w", (64 * 256, 1024), dtype=dtype))] * 4)
    assert len(plan.tensors[0].boxes) == 1
    assert not_tf_readable(plan) == []


def test_what_spans_ranks_in_such_a_dtype_is_told() -> None:
    parts = [Box((0,), (4,)), Box((4,), (4,))]
    layouts = [layout(leaf("w", (8,), part, dtype="float16", kind="slice:numpy")) for part in parts]
    plan = make_plan(layouts)
    check(plan, layouts)
    assert not_tf_readable(plan) == ["w"]


def test_tensors_of_too_many_dimensions_stay_whole() -> None:
    plan = make_plan([layout(leaf("w", (64 * 256, 1024, *(1,) * 7)))] * 2)
    assert len(plan.tensors[0].boxes) == 1


def test_pipeline_ranks_keep_their_own_leaves() -> None:
    layouts = [layout(leaf(f"stage{rank}", (8, 8)), leaf("shared", (8,))) for rank in range(3)]
    plan = make_plan(layouts)
    check(plan, layouts)
    owned = [{layouts[r].leaves[copy.leaf].name for copy in plan.ranks[r].copies} for r in range(3)]
    assert all(f"stage{r}" in owned[r] for r in range(3))


def test_a_loaded_holder_gets_less_of_what_is_shared() -> None:
    own = leaf("own", (30 * 256, 1024))
    shared = leaf("shared", (60 * 256, 1024))
    plan = make_plan([layout(own, shared), layout(shared), layout(shared)])
    assert loads(plan) == [30 * MIB] * 3


def test_large_leaves_come_first_then_small_then_strings() -> None:
    state = layout(
        leaf("s", (2,), dtype="string"),
        leaf("tiny", (2,), dtype="int8"),
        leaf("big8", (1 << 20,), dtype="int8"),
        leaf("small", (2,)),
        leaf("big32", (1 << 20,)),
    )
    (rank,) = make_plan([state]).ranks
    assert [state.leaves[copy.leaf].name for copy in rank.copies] == ["big32", "big8", "small", "tiny", "s"]


@pytest.mark.parametrize(("mib", "writers"), [(1, 1), (127, 1), (128, 2), (1000, 2)])
def test_a_rank_has_as_many_writers_as_its_bytes_deserve(mib: int, writers: int) -> None:
    plan = make_plan([layout(*(leaf(f"w{i}", (mib * 64, 256)) for i in range(16)))])
    assert plan.num_writers == writers
    assert [writer.stop - writer.first for writer in plan.ranks[0].writers] == [16 // writers] * writers


def test_each_writer_begins_on_a_page() -> None:
    state = layout(*(leaf(f"w{i}", (1001,), dtype="int8") for i in range(100)), leaf("s", (2,), dtype="string"))
    plan = make_plan([state], max_writers_per_rank=3, min_writer_nbytes=1)
    check(plan, [state])
    (rank,) = plan.ranks
    starts = [rank.copies[writer.first].start for writer in rank.writers]
    assert len(starts) == 3
    assert [start % 4096 for start in starts] == [0, 0, 0]


def test_a_rank_that_writes_nothing_has_no_writer() -> None:
    plan = make_plan([layout(leaf("w", (2,)))] * 2)
    assert [len(rank.writers) for rank in plan.ranks] == [1, 0]
    assert plan.num_writers == 1


def test_only_presumed_replicas_are_checked() -> None:
    half = [Box((0,), (2,)), Box((2,), (2,))]
    layouts = [
        layout(
            leaf("a", (4,)),
            leaf("global", (4,), kind="jax:global"),
            leaf("part", (4,), half[rank], kind="slice:numpy"),
            leaf(f"own{rank}", (4,)),
            leaf("local", (), kind="jax"),
        )
        for rank in range(2)
    ]
    assert [rank.checks for rank in make_plan(layouts).ranks] == [(0, 4), (0, 4)]
    assert make_plan([layouts[0], layout(leaf("part", (4,), half[1], kind="slice:numpy"))]).ranks[0].checks == ()


def test_checks_follow_each_ranks_own_order() -> None:
    a, b = leaf("a", (4,)), leaf("b", (4,))
    assert [rank.checks for rank in make_plan([layout(a, b), layout(b)]).ranks] == [(1,), (0,)]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (leaf("w", (5,)), r"w: float32\[4\] on ranks 0, 1 but float32\[5\] on ranks 2"),
        (leaf("w", (4,), dtype="int8"), r"w: float32\[4\] on ranks 0, 1 but int8\[4\] on ranks 2"),
    ],
)
def test_ranks_that_disagree_are_named(other: LeafSpec, text: str) -> None:
    with pytest.raises(StateError, match=text):
        make_plan([layout(leaf("w", (4,)))] * 2 + [layout(other)])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([Box((0,), (2,)), Box((3,), (1,))], "w: no slice holds element"),
        ([Box((0,), (3,)), Box((2,), (2,))], r"w: slices \[0:3\] and \[2:4\] overlap"),
        ([Box((0,), (4,)), Box((2,), (2,))], "w: slices .* overlap"),
    ],
)
def test_gaps_and_overlaps_are_errors(parts: list[Box], text: str, dtype: str) -> None:
    with pytest.raises(StateError, match=text):
        make_plan([layout(leaf("w", (4,), part, dtype=dtype, kind="slice:numpy")) for part in parts])


def test_empty_parts_are_left_out() -> None:
    layouts = [
        layout(leaf("w", (4,), Box((0,), (4,)), kind="slice:numpy"), leaf("z", (0, 2))),
        layout(leaf("w", (4,), Box((4,), (0,)), kind="slice:numpy"), leaf("z", (0, 2), Box((0, 1), (0, 1)))),
    ]
    plan = make_plan(layouts)
    check(plan, layouts)
    assert [tensor.boxes for tensor in plan.tensors] == [(Box((0,), (4,)),), (Box((0, 0), (0, 2)),)]


def stage(name: str, *boxes: Box) -> LeafSpec:
    """An empty array with these parts on this rank, maybe none."""
    return LeafSpec(name, "float32", (0, 2), boxes, "jax:global")


def test_an_empty_array_is_written_by_a_rank_that_has_it() -> None:
    whole = Box.whole((0, 2))
    for held, without in ((0, 1), (1, 0)):
        layouts = [layout(), layout()]
        layouts[held], layouts[without] = layout(stage("z", whole), leaf("own", (2,))), layout(stage("z"))
        plan = make_plan(layouts)
        assert whole in [copy.box for copy in plan.ranks[held].copies]
        assert plan.ranks[without].copies == ()


def test_an_empty_array_that_no_rank_has_is_written_all_the_same() -> None:
    plan = make_plan([layout(stage("z")), layout(stage("z"))])
    assert [tensor.boxes for tensor in plan.tensors] == [(Box.whole((0, 2)),)]
    assert sum(len(rank.copies) for rank in plan.ranks) == 1


def test_the_plan_id_tells_layouts_and_settings_apart() -> None:
    a, b = layout(leaf("a", (2,))), layout(leaf("b", (2,)))
    ids = [
        make_plan([a, b]).plan_id,
        make_plan([b, a]).plan_id,
        make_plan([a, a]).plan_id,
        make_plan([a, b], cut_nbytes=1).plan_id,
    ]
    assert len(set(ids)) == 4
    assert make_plan([a, b]).plan_id == ids[0]


def test_the_plan_id_tells_versions_of_the_division_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [layout(leaf("a", (2,)))]
    before = make_plan(state)
    monkeypatch.setattr(divide, "_PLANNER_VERSION", divide._PLANNER_VERSION + 1)
    assert make_plan(state).plan_id != before.plan_id


def test_settings_must_be_positive() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        make_plan([layout()], cut_nbytes=0)


def test_an_empty_state_has_an_empty_plan() -> None:
    plan = make_plan([layout()] * 2)
    assert (plan.tensors, plan.num_writers, loads(plan)) == ((), 0, [0, 0])


@pytest.mark.parametrize("world_size", [3, 16, 64])
def test_many_hosts_write_equal_parts_of_leaves_below_the_limit(world_size: int) -> None:
    leaves = [leaf(f"w{i}", (n, 1024)) for i, n in enumerate([3072, 3000, 2304, 768] * 30)]
    plan = make_plan([layout(*leaves)] * world_size)
    even = sum(loads(plan)) / world_size
    assert 0.95 * even < min(loads(plan)) <= max(loads(plan)) < 1.05 * even
    whole = sum(len(tensor.boxes) == 1 for tensor in plan.tensors)
    assert whole >= len(leaves) - 2 * world_size


def test_no_tensor_lies_in_thousands_of_slices_of_little() -> None:
    world_size = 3000
    plan = make_plan([layout(leaf("w", (2 << 20, 256)))] * world_size)
    assert len(plan.tensors[0].boxes) <= 1024
    assert sum(loads(plan)) == 2 << 30
    large = make_plan([layout(leaf("w", (64 << 20, 1024)))] * world_size)
    assert len(large.tensors[0].boxes) == world_size
    assert max(loads(large)) < 1.1 * (256 << 30) / world_size


def test_pieces_are_worth_a_slice() -> None:
    world_size = 12
    shared = leaf("w", (2400, 256))
    layouts = [layout(leaf(f"own{rank}", (2100, 256)), shared) for rank in range(world_size)]
    plan = make_plan(layouts)
    check(plan, layouts)
    boxes = next(tensor.boxes for tensor in plan.tensors if tensor.name == "w")
    assert 8 <= len(boxes) <= 10
    assert max(loads(plan)) < 1.05 * sum(loads(plan)) / world_size


def test_small_shares_are_not_worth_a_cut() -> None:
    plan = make_plan([layout(leaf("w", (5 * 256, 1024)))] * 4)
    assert sorted(loads(plan)) == [0, 0, 0, 5 * MIB]


def test_ranks_without_a_part_are_named() -> None:
    halves = [Box((0, 0), (4, 8)), Box((4, 0), (4, 8))]
    first = layout(leaf("a", (2,)), leaf("w", (8, 8), halves[0], kind="jax:global"))
    other = layout(leaf("a", (2,)))
    text = (
        r"w: no slice holds element \(4, 0\) of shape \(8, 8\).*; nothing of it is in the state of ranks 1, 2: every"
        " process that holds a part of an array must be a rank of the job and have the leaf in its state"
    )
    with pytest.raises(StateError, match=text):
        make_plan([first, other, other])
    with pytest.raises(
        StateError, match=r"nothing of it is in the state of ranks 1, 2, 3, 4, 5, 6, 7, 8, \.\.\.: every"
    ):
        make_plan([first, *[other] * 11])
    # All ranks have it, so none of them is to blame.
    with pytest.raises(StateError, match=r"a rank's part is missing$"):
        make_plan([first, first])
    make_plan([first, layout(leaf("w", (8, 8), halves[1], kind="jax:global"))])
