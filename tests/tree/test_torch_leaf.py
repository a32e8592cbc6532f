"""Torch tensors as leaves, where torch is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_ckpt.bundle import dtype_of
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import build, describe, read_box, wanted
from ray_ckpt.types import Box

torch = pytest.importorskip("torch")

NAMES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int64", "bool", "complex64"]


def read(value: Any) -> np.ndarray:
    spec = describe("x", value, 0, 1)
    return read_box(value, spec, spec.boxes[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
def test_tensors(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, name))
    spec = describe("x", tensor, 0, 1)
    assert (spec.dtype, spec.shape, spec.boxes, spec.kind) == (name, shape, (Box.whole(shape),), "torch")
    array = read(tensor)
    assert array.dtype == dtype_of(name)
    for like in (tensor, None):
        got = build("torch", like, {Box.whole(shape): array.copy()})
        assert got.dtype == tensor.dtype
        assert got.tolist() == tensor.tolist()


def test_any_strides_gradients_and_lazy_signs() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(read(base.T), base.numpy().T)
    weight = torch.nn.Parameter(base.clone())
    np.testing.assert_array_equal(read(weight), base.numpy())
    assert build("torch", weight, {Box((0, 0), (3, 4)): base.numpy()}).requires_grad
    lazy = torch.tensor([1 + 2j]).conj()
    assert read(lazy)[0] == 1 - 2j


def test_a_part_of_a_tensor() -> None:
    value = torch.arange(12).reshape(3, 4).to(torch.bfloat16)
    spec = describe("x", value, 0, 1)
    assert wanted("x", value) == ("bfloat16", (3, 4), (Box((0, 0), (3, 4)),))
    part = read_box(value, spec, Box((1, 2), (2, 2)))
    np.testing.assert_array_equal(part.astype(int), [[6, 7], [10, 11]])


def test_read_only_arrays_are_taken_over() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    assert build("torch", torch.zeros(3, dtype=torch.int64), {Box((0,), (3,)): array}).tolist() == [0, 1, 2]


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(StateError, match=r"w: cannot save .*not a dense tensor"):
        describe("w", torch.eye(2).to_sparse(), 0, 1)
    with pytest.raises(StateError, match=r"w: .*meta device"):
        describe("w", torch.zeros(2, device="meta"), 0, 1)


def test_a_meta_tensor_is_an_abstract_target() -> None:
    like = torch.empty(2, device="meta")
    assert wanted("w", like) == ("float32", (2,), (Box((0,), (2,)),))
    got = build("torch", like, {Box((0,), (2,)): np.ones(2, np.float32)})
    assert (got.device.type, got.tolist()) == ("cpu", [1, 1])
