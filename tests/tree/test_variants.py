"""Variant tensors as leaves, without TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import UsageError
from ray_ckpt.leaves import Variants, build, describe, read_box, token, wanted
from ray_ckpt.types import Box

VALUE = Variants([b"a", b"", b"ccc", b"d"], (2, 2))


def test_it_is_described_and_read_as_bytes() -> None:
    spec = describe("it", VALUE, 0, 1)
    assert (spec.dtype, spec.shape, spec.boxes, spec.kind) == ("variant", (), (Box.whole(()),), "variant")
    assert read_box(VALUE, spec, Box.whole(())).tolist() == [[b"a", b""], [b"ccc", b"d"]]


@pytest.mark.parametrize("like", [Variants([b""]), None])
def test_it_comes_back(like: Any) -> None:
    if like is not None:
        assert wanted("it", like) == ("variant", (), (Box.whole(()),))
    array = np.array([[b"a", b""], [b"ccc", b"d"]], object)
    assert build("variant", like, {Box.whole((2, 2)): array}) == VALUE


def test_a_scalar_is_one_element() -> None:
    value = Variants([b"state"])
    spec = describe("it", value, 0, 1)
    assert read_box(value, spec, Box.whole(())).item() == b"state"


def test_another_shape_needs_no_other_plan() -> None:
    other = Variants([b"1", b"2"], (2,))
    assert token(VALUE) == token(other) is not None
    assert describe("it", VALUE, 0, 1) == describe("it", other, 0, 1)


@pytest.mark.parametrize(
    ("values", "shape", "found"),
    [([b"a"], (2,), "found 1 values of type bytes"), (["a"], (1,), "type str"), ([], (), "type none")],
)
def test_one_bytes_for_each_element_is_needed(values: Any, shape: tuple[int, ...], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        Variants(values, shape)
