"""TensorFlow's text for a rectangle of a larger tensor, as ops and savers pass it on.

Source: ``Variable.SaveSliceInfo.spec`` in tensorflow/python/ops/variables.py.
"""

from __future__ import annotations

from ray_ckpt.errors import UsageError
from ray_ckpt.types import Box, Shape


def parse_slice_spec(spec: str) -> tuple[Shape, Box]:
    """(shape of the whole, rectangle) of "10 3 4,3:-": extents; offset,length of each dimension, "-" for all of it.

    Raises:
        UsageError: not of this form.
    """
    try:
        *extents, ranges = spec.split(" ")
        shape = tuple(map(int, extents))
        pairs = [
            (0, extent) if text == "-" else tuple(map(int, text.split(",")))
            for extent, text in zip(shape, ranges.split(":"), strict=True)
        ]
        offset, lengths = zip(*pairs, strict=True)
    except ValueError:
        raise UsageError(f"{spec!r} is not a slice spec as in '10 3 4,3:-'") from None
    return shape, Box(offset, lengths)
