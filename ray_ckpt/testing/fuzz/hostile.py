"""What an attacker would put in: numbers, paths, nesting, and edits of bytes and of JSON."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

OUTSIDE = ("/etc/passwd", "/etc/hostname", "/proc/self/environ")
"""Absolute paths that no reader of a checkpoint may open."""

PATHS = (
    *OUTSIDE,
    *("../../x", "../canary", "..", ".", "", "/", "a//b", "a/../../canary", "./a", "a/", "~/x", "C:\\x", "..\\x"),
    *(
        "a\0b",
        "\0",
        "a\nb",
        "\x1b[2J",
        "x" * 300,
        "x/" * 3000 + "y",
        "\ud800",
        "é" * 200,
        "\u202egnp.exe",
        "-",
        "--yes",
    ),
    *("file:///etc/passwd", "s3://bucket/x", "%2e%2e%2fcanary", "_ray_ckpt", "_ray_ckpt/log/00000000000000000001"),
    *("model.ckpt-500", "model.ckpt-" + "9" * 400, "e1-1/model.ckpt-500", "checkpoint", "${HOME}", "{0.__class__}"),
)

NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1),
    *(10**400, -(10**400), 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan, 0.5, -0.0, True, False, None),
)

UNSIGNED = (0, 1, 4, 127, 128, 2**14, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
"""Lengths, offsets and counts that a varint or a word can hold."""

_DEEP = "@deep@"
_DEPTHS = (200, 900, 3_000, 100_000)
_VALUES: tuple[Any, ...] = (*NUMBERS, *PATHS, [], {}, [[]], [None], {"": 0}, "1", "1e999", [0] * 2000, _DEEP)

Edit = Callable[[Random, bytes], bytes]


def number(rng: Random) -> int:
    """A length or an offset: an extreme one, or next to one."""
    return max(0, min(2**64 - 1, rng.choice(UNSIGNED) + rng.randint(-2, 2)))


def mangle(rng: Random, raw: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four edits: flipped bits, cuts, insertions, repetitions, splices with other inputs."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        raw = rng.choice(_EDITS)(rng, raw) if raw else rng.randbytes(rng.choice((0, 1, 4, 8, 64)))
        if others and rng.random() < 0.1:
            other = rng.choice(others)
            raw = raw[: rng.randint(0, len(raw))] + other[rng.randint(0, len(other)) :]
    return raw


def _flip(rng: Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes((raw[at] ^ 1 << rng.randrange(8),)) + raw[at + 1 :]


def _overwrite(rng: Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    width = rng.choice((1, 2, 4, 8))
    value = (number(rng) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    return raw[:at] + value + raw[at + width :]


def _insert(rng: Random, raw: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    return raw[:at] + rng.choice((b"\0", b"\xff", b"[", b"{", b'"', rng.randbytes(rng.randint(1, 16)))) + raw[at:]


def _repeat(rng: Random, raw: bytes) -> bytes:
    start, stop = sorted((rng.randint(0, len(raw)), rng.randint(0, len(raw))))
    return raw[:stop] + raw[start:stop] * rng.choice((1, 2, 16)) + raw[stop:]


def _cut(rng: Random, raw: bytes) -> bytes:
    start, stop = sorted((rng.randint(0, len(raw)), rng.randint(0, len(raw))))
    return raw[:start] + raw[stop:]


def _truncate(rng: Random, raw: bytes) -> bytes:
    return raw[: rng.randint(0, len(raw))]


def _zero(rng: Random, raw: bytes) -> bytes:
    start, stop = sorted((rng.randint(0, len(raw)), rng.randint(0, len(raw))))
    return raw[:start] + bytes(stop - start) + raw[stop:]


def _append(rng: Random, raw: bytes) -> bytes:
    return raw + rng.choice((b"\0", b"\n", bytes(4096), rng.randbytes(rng.randint(1, 64))))


_EDITS: tuple[Edit, ...] = (_flip, _flip, _overwrite, _insert, _repeat, _cut, _truncate, _zero, _append)


def mutate_json(rng: Random, value: Any) -> Any:
    """The JSON value with one to three of its parts replaced, removed, repeated, moved or wrapped."""
    box = [json.loads(json.dumps(value))]
    for _ in range(rng.choice((1, 1, 2, 3))):
        slots = list(_slots(box))
        parent, key = rng.choice(slots)
        kind = rng.randrange(8)
        if kind < 4:
            parent[key] = copy.deepcopy(rng.choice(_VALUES))
        elif kind == 4 and parent is not box:
            del parent[key]
        elif kind == 5:
            other, where = rng.choice(slots)
            parent[key] = json.loads(json.dumps(other[where]))
        elif kind == 6:
            parent[key] = rng.choice(([parent[key]] * rng.choice((1, 3)), str(parent[key]), {"a": parent[key]}))
        elif isinstance(parent, dict):
            parent[rng.choice(PATHS)] = parent[key]
        else:
            parent.extend([parent[key]] * rng.choice((1, 100)) if parent is not box else [])
    return box[0]


def edit_json(rng: Random, raw: bytes) -> bytes:
    """The text with its JSON mutated, or where it is none (any more) its bytes."""
    try:
        return json_bytes(rng, mutate_json(rng, json.loads(raw)))
    except (ValueError, RecursionError):
        return mangle(rng, raw)


def _slots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in the containers."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo and len(found) < 5000:
        parent = todo.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        for key in keys:
            found.append((parent, key))
            if isinstance(parent[key], (dict, list)):
                todo.append(parent[key])
    return found


def json_bytes(rng: Random, value: Any) -> bytes:
    """Its text in one of the ways to spell it; nesting goes down as deep as no encoder would."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    depth = rng.choice(_DEPTHS)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    if f'"{_DEEP}"' in text:
        text = text.replace(f'"{_DEEP}"', opening * depth + "0" + closing * depth)
    if rng.random() < 0.02:
        text = text.replace("1", "1" * rng.choice((5_000, 400_000)), 1)
    encoding = rng.choice(("utf-8",) * 12 + ("utf-16", "utf-32", "utf-8-sig"))
    return text.encode(encoding, "surrogatepass")
