"""TensorFlow's element types: number in the file, name, numpy dtype.

Source: ``tensorflow/core/framework/types.proto``. Elements lie in a data shard in C order, little-endian;
the types of less than a byte (int4, uint4, int2, uint2, float4_e2m1fn) take one byte an element.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ray_ckpt.errors import StateError

_NUMPY: dict[str, tuple[int, Any]] = {
    "float32": (1, np.float32),
    "float64": (2, np.float64),
    "int32": (3, np.int32),
    "uint8": (4, np.uint8),
    "int16": (5, np.int16),
    "int8": (6, np.int8),
    "string": (7, np.object_),
    "complex64": (8, np.complex64),
    "int64": (9, np.int64),
    "bool": (10, np.bool_),
    "qint8": (11, np.int8),
    "quint8": (12, np.uint8),
    "qint32": (13, np.int32),
    "bfloat16": (14, ml_dtypes.bfloat16),
    "qint16": (15, np.int16),
    "quint16": (16, np.uint16),
    "uint16": (17, np.uint16),
    "complex128": (18, np.complex128),
    "float16": (19, np.float16),
    "variant": (21, np.object_),
    "uint32": (22, np.uint32),
    "uint64": (23, np.uint64),
    "float8_e5m2": (24, ml_dtypes.float8_e5m2),
    "float8_e4m3fn": (25, ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": (26, ml_dtypes.float8_e4m3fnuz),
    "float8_e4m3b11fnuz": (27, ml_dtypes.float8_e4m3b11fnuz),
    "float8_e5m2fnuz": (28, ml_dtypes.float8_e5m2fnuz),
    "int4": (29, ml_dtypes.int4),
    "uint4": (30, ml_dtypes.uint4),
    "int2": (31, ml_dtypes.int2),
    "uint2": (32, ml_dtypes.uint2),
    "float4_e2m1fn": (33, ml_dtypes.float4_e2m1fn),
}

_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(scalar) for name, (_, scalar) in _NUMPY.items()}
_NUMBERS = {name: number for name, (number, _) in _NUMPY.items()}
_NAMES = {number: name for name, number in _NUMBERS.items()} | {20: "resource"}

STRING = "string"
VARIANT = "variant"
"""Names of the types whose elements have no fixed size: bytes, and serialized VariantTensorDataProto."""

QUANTIZED = frozenset({"qint8", "quint8", "qint16", "quint16", "qint32"})
"""TensorFlow's quantized integers: read as the plain integers of their size, never written."""

DTYPE_NAMES = frozenset(_NUMPY) - QUANTIZED - {VARIANT}
"""The names that arrays of a state may use; `leaves.Variants` is of `VARIANT`."""

UNPARTITIONABLE = frozenset(
    {"float16", "uint16", "uint32", "uint64", "int2", "uint2", "float4_e2m1fn", STRING, VARIANT}
    | {name for name in _NUMPY if name.startswith("float8")}
)
"""Names of the types that TensorFlow cannot read as a whole from a tensor stored in slices.

It still reads a slice exactly as stored. The way round: give the whole tensor to one writer, or save it as
a type of the same or a larger size that TensorFlow does read (bfloat16, float32, int16, int32, int64).
"""


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a type's name; object for "string" and "variant", both bytes.

    Raises:
        StateError: numpy has no such type (also for TensorFlow's "resource").
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise StateError(
            f"dtype {name!r} has no numpy form; expected one of {', '.join(sorted(DTYPE_NAMES))}"
        ) from None


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The type's name of a numpy dtype; "string" for objects, bytes and str, whatever their length.

    Byte order is ignored: the caller turns big-endian arrays round.

    Raises:
        StateError: TensorFlow has no such type.
    """
    if dtype.kind in "OSU":
        return STRING
    if dtype.name not in DTYPE_NAMES:
        raise StateError(
            f"numpy dtype {dtype.name!r} cannot be stored in a TensorFlow checkpoint; "
            f"cast the array to one of {', '.join(sorted(DTYPE_NAMES))}"
        )
    return dtype.name


def dtype_number(name: str) -> int:
    """TensorFlow's number of a type's name.

    Raises:
        StateError: unknown name.
    """
    dtype_of(name)
    return _NUMBERS[name]


def dtype_of_number(number: int) -> str | None:
    """The name of TensorFlow's number, or None where TensorFlow 2.21 has none."""
    return _NAMES.get(number)


def nbytes_of(name: str, count: int) -> int | None:
    """Size in bytes of ``count`` elements; None where the values decide (string, variant, resource)."""
    if name not in _DTYPES or _DTYPES[name].hasobject:
        return None
    return _DTYPES[name].itemsize * count
