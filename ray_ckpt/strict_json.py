"""JSON of files that anybody may have written: what Python's own reader takes beyond JSON is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
"""What taking such a value apart raises where it is not of the form that was expected."""

MIN_INT, MAX_INT = -(2**63), 2**63 - 1


def parse(raw: bytes | str) -> Any:
    """The value of this text, UTF-8 if it is bytes.

    Raises `ValueError` for anything else: also for numbers that are not finite, and for nesting that no recursive
    reader can follow.
    """
    try:
        return _DECODER.decode(raw if isinstance(raw, str) else raw.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None


def integer(value: Any) -> int:
    """The number, or text of one, as an int of 64 bits. Raises one of `MALFORMED`."""
    found = int(value)
    if not MIN_INT <= found <= MAX_INT:
        raise ValueError("a number of more than 64 bits")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
