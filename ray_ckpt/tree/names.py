"""How a leaf is named: its path, escaped part by part (see the package)."""

from __future__ import annotations

import re
from typing import Any

from ray_ckpt.errors import StateError

ROOT_NAME = "%root"
_EMPTY_PART = "%-"
_SPECIAL = re.compile(r"[%/\x00-\x1f\x7f]")


def join_name(parent: str, part: str) -> str:
    """The name of a child; ``part`` is not escaped yet."""
    escaped = escape(part)
    return f"{parent}/{escaped}" if parent else escaped


def escape(part: str) -> str:
    """One part of a name, without what means something in it."""
    # The commonest keys have nothing to escape, which this tells sooner than a search does.
    if part.isidentifier():
        return part
    if not part:
        return _EMPTY_PART
    return _SPECIAL.sub(lambda match: f"%{ord(match[0]):02X}", part)


def part_of(key: Any, name: str) -> str:
    """A dict key as text.

    Raises:
        StateError: a type of key that has no rule.
    """
    if type(key) is str:
        return key
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or type(key) in (int, bool, float):
        return repr(key)
    raise StateError(
        f"{name or 'the state'} is a dict with the key {key!r} of type {type(key).__name__}; "
        "use str, int, bool, float or None"
    )
