"""What each leaf is, its bytes, and the leaf back from them."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ray_ckpt.bundle import DTYPE_NAMES, dtype_of
from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.leaves import PerWorker, Slice, build, describe, parts, read_box, wanted
from ray_ckpt.leaves.base import merge_boxes
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.types import Box


def stored(value: Any) -> tuple[str, np.ndarray]:
    """Kind and the whole array as it would be stored: little-endian, C order."""
    spec = describe("x", value, 0, 1)
    (box,) = spec.boxes
    array = read_box(value, spec, box)
    return spec.kind, np.array(array, dtype_of(spec.dtype), order="C")


def round_trip(value: Any, like: Any) -> Any:
    kind, array = stored(value)
    (box,) = wanted("x", like).boxes if like is not None else (Box.whole(array.shape),)
    return build(kind, like, {box: array})


@pytest.mark.parametrize("value", [0, -(2**63), 2**63 - 1, True, False, 1.5, 2 + 3j, "grüße\0", "", b"\xff\0"])
def test_python_values_come_back_as_they_were(value: Any) -> None:
    for like in (None, type(value)()):
        got = round_trip(value, like)
        assert got == value
        assert type(got) is type(value)


def test_a_nan_keeps_its_bits() -> None:
    bits = np.array([0x7FF8_0000_DEAD_BEEF, 0xFFF0_0000_0000_0001], np.uint64)
    for array in (bits.view(np.float64), bits.view(np.float64).astype(">f8")):
        np.testing.assert_array_equal(stored(array)[1].view(np.uint64), bits)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_int_beyond_int64_is_an_error(value: int) -> None:
    with pytest.raises(StateError, match=r"count: the int .* does not fit int64"):
        describe("count", value, 0, 1)


@pytest.mark.parametrize("name", sorted(DTYPE_NAMES - {"string"}))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_numpy_arrays_of_every_dtype(name: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype_of(name))
    spec = describe("x", array, 0, 1)
    assert (spec.dtype, spec.shape, spec.boxes, spec.kind) == (name, shape, (Box.whole(shape),), "numpy")
    for like in (None, np.empty_like(array)):
        got = round_trip(array, like)
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_numpy_arrays_in_any_memory_order() -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    read_only = base.copy()
    read_only.flags.writeable = False
    for array in (base[::2, ::-1], base.T, base.astype(">i4"), np.asfortranarray(base), read_only):
        np.testing.assert_array_equal(stored(array)[1], array)
    assert stored(base.astype(">i4"))[1].dtype.str == "<i4"


def test_reading_an_array_copies_nothing() -> None:
    array = np.arange(6.0)
    ((_, part),) = parts(array, Box((2,), (3,)))
    assert np.shares_memory(part, array)
    np.testing.assert_array_equal(part, [2, 3, 4])


def test_the_target_decides_the_byte_order() -> None:
    got = build("numpy", np.zeros(2, ">i4"), {Box((0,), (2,)): np.array([1, 2], np.int32)})
    assert (got.dtype.str, got.tolist()) == (">i4", [1, 2])


def test_numpy_scalars() -> None:
    got = round_trip(np.float32(1.5), None)
    assert type(got) is np.float32
    assert type(round_trip(np.float32(1.5), np.float32(0))) is np.float32


@pytest.mark.parametrize(
    "array",
    [
        np.array([["a", "grüße"], ["", "b\0c"]], object),
        np.array([b"\xff\0", b""], object),
        np.array(["ab", "c"]),
        np.array([b"ab", b"c"]),
        np.array([], object),
    ],
)
def test_text_arrays_become_strings(array: np.ndarray) -> None:
    assert describe("x", array, 0, 1).dtype == "string"
    for like in (None, array):
        got = round_trip(array, like)
        assert got.shape == array.shape
        assert got.tolist() == array.tolist()
    assert round_trip(array, array).dtype.kind == array.dtype.kind


def test_fixed_width_text_grows_to_what_is_stored() -> None:
    got = build("numpy:str", np.array(["a"]), {Box((0,), (1,)): np.array([b"longer"], object)})
    assert got.tolist() == ["longer"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), r"model/x: cannot save a builtins.object.*json.dumps.*pickle.dumps.*PerWorker"),
        (np.array([1, "a"], object), r"model/x: an object array with elements of type int, str"),
        (np.array([None]), "NoneType"),
        (np.array(["2020-01-01"], "M8[D]"), r"model/x: numpy dtype 'datetime64\[D\]'"),
        (np.zeros(2, [("a", "f4")]), "model/x: numpy dtype"),
        (np.ma.masked_array([1], [True]), "model/x: .*its data and its mask"),
        (set(), "model/x: cannot save a builtins.set"),
        (lambda: 0, "model/x: cannot save"),
        ("\ud800", "model/x: the str is not valid UTF-8"),
        (Slice(np.zeros(3), (4,), (2,)), r"model/x: a Slice of shape \(3,\) at offset \(2,\)"),
        (Slice(Slice(np.zeros(3), (4,), (0,)), (8,), (0,)), "model/x: a Slice of what is itself a part"),
        (PerWorker(PerWorker(1)), "model/x: PerWorker inside PerWorker"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, text: str) -> None:
    with pytest.raises(StateError, match=text):
        describe("model/x", value, 0, 1)


@pytest.mark.parametrize(
    ("array", "global_shape", "offset"),
    [
        (np.zeros(3), (4, 4), (0,)),
        (np.zeros(3), (4,), (0, 0)),
        (np.zeros((3, 1)), (4,), (0,)),
        ([], (4, 4), (0,)),
        (np.zeros(3), (4,), (-1,)),
        (np.zeros(3), (-4,), (0,)),
    ],
)
def test_a_slice_that_fits_nowhere_is_refused_at_once(array: Any, global_shape: Any, offset: Any) -> None:
    text = re.escape(f"global_shape={global_shape} and offset={offset}")
    with pytest.raises(UsageError, match=text):
        Slice(array, global_shape, offset)


@pytest.mark.parametrize("rule", ["zz", None, 3])
def test_an_unknown_rule_is_refused_at_once(rule: Any) -> None:
    with pytest.raises(UsageError, match=rf"takes 'error', 'first', 'init' or a function, found {rule!r}"):
        PerWorker(1, on_resize=rule)


def test_slices_are_placed_in_their_global_array() -> None:
    part = Slice(np.arange(6.0).reshape(2, 3), (4, 6), (2, 3))
    spec = describe("w", part, 1, 4)
    assert (spec.shape, spec.boxes, spec.kind) == ((4, 6), (Box((2, 3), (2, 3)),), "slice:numpy")
    np.testing.assert_array_equal(read_box(part, spec, Box((3, 3), (1, 2))), [[3, 4]])
    assert [box for box, _ in parts(part, Box((3, 3), (1, 2)))] == [Box((3, 3), (1, 2))]
    like = Slice(np.zeros((1, 6)), (4, 6), (3, 0))
    assert wanted("w", like) == ("float64", (4, 6), (Box((3, 0), (1, 6)),))
    got = build("slice:numpy", like, {Box((3, 0), (1, 6)): np.ones((1, 6))})
    assert (got.global_shape, got.offset, got.array.sum()) == ((4, 6), (3, 0), 6)


def test_per_worker_leaves_have_names_of_their_own() -> None:
    spec = describe("rng", PerWorker(np.arange(2)), 3, 12)
    assert (spec.name, spec.kind) == ("rng/.per_worker/00003-of-00012", "per_worker:numpy")
    np.testing.assert_array_equal(read_box(PerWorker(np.arange(2)), spec, Box((0,), (2,))), [0, 1])
    like = PerWorker(np.zeros(2, np.int64), on_resize="init")
    got = build("per_worker:numpy", like, {Box((0,), (2,)): np.arange(2)})
    assert (got.on_resize, got.value.tolist()) == ("init", [0, 1])
    bare = build("per_worker:int", None, {Box((), ()): np.array(5)})
    assert isinstance(bare, PerWorker)
    assert bare.value == 5


def test_merging_leaves_few_rectangles() -> None:
    grid = [Box((i, j), (1, 2)) for i in range(4) for j in (0, 2, 4)]
    assert merge_boxes(grid) == (Box((0, 0), (4, 6)),)
    corner = [Box((0, 0), (2, 2)), Box((0, 2), (2, 2)), Box((2, 0), (2, 2))]
    assert len(merge_boxes(corner)) == 2
    assert merge_boxes([]) == ()


def test_fingerprints_tell_layouts_apart() -> None:
    base = {"a": np.zeros((2, 3), np.float32), "b": 1}
    other: list[Any] = [
        {"a": np.zeros((3, 2), np.float32), "b": 1},
        {"a": np.zeros((2, 3), np.int32), "b": 1},
        {"a": np.zeros((2, 3), np.float32), "b": 1.0},
        {"a": np.zeros((2, 3), np.float32), "c": 1},
        {"a": Slice(np.zeros((2, 3), np.float32), (4, 3), (0, 0)), "b": 1},
        {"a": np.zeros((2, 3), np.float32), "b": np.int64(1)},
        [np.zeros((2, 3), np.float32), 1],
        (np.zeros((2, 3), np.float32), 1),
    ]
    same = {"a": np.ones((2, 3), np.float32), "b": 2}
    prints = [layout_of(state, 0, 1)[0].fingerprint for state in (base, *other)]
    assert len(set(prints)) == len(prints)
    assert layout_of(same, 0, 1)[0] == layout_of(base, 0, 1)[0]


def test_no_framework_is_imported() -> None:
    code = (
        "import sys; from ray_ckpt.leaves.layout import layout_of; import ray_ckpt.writer, ray_ckpt.snapshot; "
        "layout_of({'a': 1, 'b': [1.5, 'x']}, 0, 1); "
        "sys.exit(', '.join({'jax', 'tensorflow', 'torch'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_bfloat16_is_itself() -> None:
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    assert describe("x", array, 0, 1).dtype == "bfloat16"
