"""JSON of the records in `types`: strict about what they need, blind to keys that newer versions add.

Each carries the crc32c of all its other keys; one without, from an older version, is read as well.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

from ray_ckpt import strict_json
from ray_ckpt.bundle import crc32c
from ray_ckpt.errors import CheckpointError, DamagedError, UsageError
from ray_ckpt.storage.base import checked_path
from ray_ckpt.types import FORMAT_VERSION, Claim, LogRecord

T = TypeVar("T")

CHECKSUM = "crc32c"
"""Key of the checksum: crc32c of the JSON of all other keys, sorted, as `json.dumps` writes it."""


def encode_record(record: LogRecord) -> bytes:
    """The record as JSON (UTF-8), with the format version and a checksum. Equal records give equal bytes.

    Raises `UsageError` for what `decode_record` would refuse: a record that nobody can read blocks the directory.
    """
    for checkpoint in (*record.live, *(dying.checkpoint for dying in record.dying)):
        checked_path(checkpoint.prefix)
    return _encode(record)


def decode_record(raw: bytes, source: str) -> LogRecord:
    """The record again. ``source`` says in errors where the bytes are from.

    Raises `CheckpointError` for a newer format, `DamagedError` for anything that is no record.
    """
    record = _decode(LogRecord, raw, source)
    for checkpoint in (*record.live, *(dying.checkpoint for dying in record.dying)):
        inside(checkpoint.prefix, source)
    return record


def encode_claim(claim: Claim) -> bytes:
    """The claim as JSON (UTF-8), as `encode_record` does it. Raises `UsageError` for what its decoder would refuse."""
    checked_path(claim.prefix)
    return _encode(claim)


def decode_claim(raw: bytes, source: str) -> Claim:
    """The claim again. Raises as `decode_record` does."""
    claim = _decode(Claim, raw, source)
    inside(claim.prefix, source)
    return claim


def inside(prefix: str, source: str) -> str:
    """The prefix itself. Raises `DamagedError` if it leaves the checkpoint directory."""
    try:
        return checked_path(prefix)
    except UsageError:
        raise DamagedError(
            f"{source} names the checkpoint {prefix!r}: expected a path inside the checkpoint directory;"
            " it was damaged or written by something else, and is not followed"
        ) from None


def _encode(record: Any) -> bytes:
    fields = dataclasses.asdict(record)
    try:
        _convert(type(record), fields)
    except (ValueError, TypeError) as error:
        raise UsageError(f"this {type(record).__name__} cannot be written, no reader would take it: {error}") from None
    value = {"format": FORMAT_VERSION, **fields}
    return json.dumps({**value, CHECKSUM: _checksum(value)}).encode()


def _checksum(value: dict[str, Any]) -> int:
    rest = {key: item for key, item in value.items() if key != CHECKSUM}
    return crc32c(json.dumps(rest, sort_keys=True).encode())


def _decode(cls: type[T], raw: bytes, source: str) -> T:
    try:
        value = strict_json.parse(raw)
        version = _convert(int, value["format"])
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{source} was written by a newer ray_ckpt (format {version}, this one knows up to"
                f" {FORMAT_VERSION}): update ray_ckpt"
            )
        if CHECKSUM in value and value[CHECKSUM] != _checksum(value):
            raise ValueError(f"its crc32c should be {value[CHECKSUM]}, is {_checksum(value)}")
        result: T = _convert(cls, value)
    except strict_json.MALFORMED as error:
        raise DamagedError(
            f"{source} is no {cls.__name__} of ray_ckpt ({type(error).__name__}: {error}; {len(raw)} bytes):"
            " it was damaged or written by something else"
        ) from None
    return result


def _convert(expected: Any, value: Any) -> Any:
    """The JSON value as this type. Raises `TypeError`, `KeyError` or `ValueError` if it is none."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(args[0], value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a list, found {value!r:.200}")
        return tuple(_convert(args[0], item) for item in value)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"expected one of {args}, found {value!r:.200}")
        return value
    if dataclasses.is_dataclass(expected):
        return _convert_fields(expected, value)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise TypeError(f"expected {expected.__name__}, found {value!r:.200}")
    if expected is float and not math.isfinite(value):
        raise ValueError(f"expected a number, found {value}")
    return strict_json.integer(value) if expected is int else value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert_fields(cls: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {value!r:.200}")
    hints = _hints(cls)
    given = {}
    for field in dataclasses.fields(cls):
        if field.name in value:
            try:
                given[field.name] = _convert(hints[field.name], value[field.name])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{field.name}: {error}") from None
        elif field.default is dataclasses.MISSING:
            raise KeyError(field.name)
    return cls(**given)
