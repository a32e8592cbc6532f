"""Random states, saved as a job saves them, come back bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.bundle import DTYPE_NAMES, dtype_of

from .saving import restore, same, save

NUMBERS = sorted(DTYPE_NAMES - {"string"})
SUBBYTE = {"int2", "uint2", "int4", "uint4", "float4_e2m1fn"}


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Any bits of any dtype, in any memory layout and byte order."""
    name = draw(st.sampled_from(NUMBERS))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype, count = dtype_of(name), int(np.prod(shape, dtype=int))
    raw = np.frombuffer(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)), np.uint8)
    # A byte holds one bool, or one element of less than a byte, with its other bits clear.
    limit = 1 if name == "bool" else 3 if name.endswith("int2") else 15
    array = (raw & limit if name == "bool" or name in SUBBYTE else raw).view(dtype).reshape(shape)
    if name in SUBBYTE:
        array = array.astype(np.float32).astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "strided", "big"]))
    if layout == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::-2]
    if layout == "big" and dtype.isbuiltin == 1:
        return array.byteswap().view(dtype.newbyteorder(">"))
    return np.asarray(array, order="F" if layout == "F" else "C")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.one_of(
    arrays(),
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    TEXT,
    st.binary(max_size=8),
    st.lists(TEXT, max_size=3).map(lambda x: np.array(x, object)),
    st.floats(width=32).map(np.float32),
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(TEXT, inner, max_size=4), st.lists(inner, max_size=3), st.tuples(inner, inner)
    ),
    max_leaves=12,
)


def native(state: Any) -> Any:
    """The state as the checkpoint alone knows it: arrays of native byte order."""
    if isinstance(state, dict):
        # The stored structure lists dict items in the order of their names.
        return {key: native(state[key]) for key in sorted(state, key=lambda key: key)}
    if isinstance(state, (list, tuple)):
        return type(state)(map(native, state))
    if isinstance(state, np.ndarray) and state.dtype.isbuiltin == 0 and state.dtype.kind in "biufc":
        return state.astype(state.dtype.newbyteorder("="))
    return state


@settings(max_examples=60)
@given(STATES)
def test_any_state(state: Any) -> None:
    stored = save([state])
    same(restore(stored, state), state)
    same(restore(stored, None), native(state))


@settings(max_examples=15)
@given(STATES, st.integers(2, 3), st.integers(1, 3))
def test_replicas_on_other_numbers_of_ranks(state: Any, saved_by: int, world_size: int) -> None:
    stored = save([state] * saved_by, cut_nbytes=16, min_writer_nbytes=32)
    for rank in range(world_size):
        same(restore(stored, state, rank, world_size), state)


@pytest.mark.parametrize(
    "values",
    [
        np.array([0x7FF8_0000_DEAD_BEEF, 0xFFF0_0000_0000_0001], np.uint64).view(np.float64),
        np.array([0x7FC1, 0xFF81, 0x8000], np.uint16).view(ml_dtypes.bfloat16),
        np.array([0x7FA0_1234], np.uint32).view(np.float32).astype(">f4"),
    ],
)
def test_payloads_of_nan(values: np.ndarray) -> None:
    stored = save([{"x": values}])
    assert restore(stored, {"x": np.zeros_like(values)})["x"].tobytes() == values.tobytes()


def test_large_arrays_in_slices() -> None:
    state = {"w": np.arange(2 << 20, dtype=np.int64).reshape(1024, -1), "small": np.arange(3)}
    stored = save([state, state], min_writer_nbytes=1 << 20, cut_nbytes=1 << 20)
    assert len(stored.tensor("w").pieces) > 1
    seen: list[tuple[int, int]] = []
    same(restore(stored, state, 0, 1, budget_nbytes=8 << 20, threads=2, progress=lambda *x: seen.append(x)), state)
    assert seen[-1][0] == seen[-1][1] >= state["w"].nbytes


def test_the_target_is_left_as_it_was() -> None:
    like = {"w": np.zeros(3)}
    got = restore(save([{"w": np.arange(3.0)}]), like)
    assert like["w"].tolist() == [0, 0, 0]
    assert got["w"].tolist() == [0, 1, 2]
