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
    assert (spec.dtype, spec.shape, spec.boxes, spec.kind) == ("variant", (2, 2), (Box.whole((2, 2)),), "variant")
    assert read_box(VALUE, spec, Box.whole((2, 2))).tolist() == [[b"a", b""], [b"ccc", b"d"]]
    assert read_box(VALUE, spec, Box((1, 0), (1, 2))).tolist() == [[b"ccc", b"d"]]


@pytest.mark.parametrize("like", [Variants([b""] * 4, (2, 2)), None])
def test_it_comes_back(like: Any) -> None:
    if like is not None:
        assert wanted("it", like) == ("variant", (2, 2), (Box.whole((2, 2)),))
    array = np.array([[b"a", b""], [b"ccc", b"d"]], object)
    assert build("variant", like, {Box.whole((2, 2)): array}) == VALUE


def test_a_scalar_is_one_element() -> None:
    value = Variants([b"state"])
    spec = describe("it", value, 0, 1)
    assert read_box(value, spec, Box.whole(())).item() == b"state"


def test_tokens_tell_shapes_and_kinds_apart() -> None:
    assert token(VALUE) == token(Variants([b"1", b"2", b"3", b"4"], (2, 2)))
    assert token(VALUE) != token(Variants([b"1", b"2", b"3", b"4"], (4,)))


@pytest.mark.parametrize(
    ("values", "shape", "found"),
    [([b"a"], (2,), "found 1 values of type bytes"), (["a"], (1,), "type str"), ([], (), "type none")],
)
def test_one_bytes_for_each_element_is_needed(values: Any, shape: tuple[int, ...], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        Variants(values, shape)
