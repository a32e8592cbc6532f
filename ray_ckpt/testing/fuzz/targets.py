"""What is fuzzed: for each reader how an input is made from a real file, and how it is read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from ray_ckpt.bundle import (
    STRING,
    VARIANT,
    Index,
    content_crc,
    crc32c,
    decode_objects,
    decode_run,
    encode_objects,
    encode_state_file,
    mask,
    parse_index_name,
    parse_shard_name,
    parse_state_file,
)
from ray_ckpt.bundle.coding import read_varint, varint
from ray_ckpt.bundle.table import read_table
from ray_ckpt.errors import DamagedError
from ray_ckpt.log.codec import CHECKSUM, decode_claim, decode_record, encode_claim, encode_record, inside
from ray_ckpt.metadata import decode
from ray_ckpt.storage.base import checked_path
from ray_ckpt.strict_json import MALFORMED
from ray_ckpt.testing.fuzz import corpus
from ray_ckpt.testing.fuzz.hostile import NUMBERS, PATHS, edit_json, json_bytes, mangle, mutate_json, number
from ray_ckpt.testing.fuzz.tables import mutate_index
from ray_ckpt.timeline import decode_timeline
from ray_ckpt.train.pointer import from_train
from ray_ckpt.tree import rebuild


@dataclass(frozen=True, slots=True)
class Target:
    """One reader: its share of all inputs, how an input is made, and how it is read."""

    name: str
    share: int
    make: Callable[[Random], Any]
    read: Callable[[Any], Any]


@cache
def indexes() -> list[bytes]:
    """The indexes of real checkpoints."""
    kinds = ("ours", "foreign", "large")
    return [raw for kind in kinds for path, raw in corpus.directory(kind).items() if path.endswith(".index")]


def make_index(rng: Random) -> bytes:
    """An index with a lie in it."""
    return mutate_index(rng, rng.choice(indexes()), indexes())


def make_state_file(rng: Random) -> bytes:
    """A `checkpoint` file with other paths and times, or of other text."""
    paths = [rng.choice(PATHS).replace("\ud800", "?") for _ in range(rng.choice((1, 2, 5)))]
    raw = encode_state_file(paths[0] or "x", paths, [float(rng.randint(0, 9)) for _ in paths])
    kind = rng.randrange(4)
    if kind == 0:
        return raw
    if kind == 1:
        return raw + rng.choice(_STATE_LINES).replace(b"?", str(rng.choice(NUMBERS)).encode()) * rng.choice((1, 500))
    return mangle(rng, raw)


_STATE_LINES = (
    *(
        b"all_model_checkpoint_timestamps: ?\n",
        b"unknown_field: ?\n",
        b"a {" * 3000,
        b"a <" * 200,
        b'x: "\\xff\\777"\n',
    ),
    *(b"[type.googleapis.com/x.Y] { a: ? }\n", b"1: ?\n", b"last_preserved_timestamp: ?\n", b"no_checkpoint: true\n"),
    *(
        b'model_checkpoint_path: "\\355\\240\\200"\n',
        b"all_model_checkpoint_timestamps: [?, ?]\n",
        b"#" * 1000,
        b"\xff",
    ),
)


def with_checksum(rng: Random, raw: bytes) -> bytes:
    """A record of the log, or a claim, that is another one but for its checksum, which is right mostly."""
    try:
        value = mutate_json(rng, json.loads(raw))
    except (ValueError, RecursionError):
        return mangle(rng, raw)
    if isinstance(value, dict) and rng.random() < 0.9:
        rest = {key: item for key, item in value.items() if key != CHECKSUM}
        value = {**rest, CHECKSUM: crc32c(json.dumps(rest, sort_keys=True).encode())}
    return json_bytes(rng, value)


def _text(raw: bytes) -> Callable[[Random], bytes]:
    """Inputs made from a text of JSON without a checksum."""

    def make(rng: Random) -> bytes:
        return mangle(rng, raw) if rng.random() < 0.2 else edit_json(rng, raw)

    return make


def make_strings(rng: Random) -> tuple[str, int, bytes]:
    """A string or variant tensor, whose lengths may lie under a checksum that is right."""
    dtype = rng.choice((STRING, VARIANT))
    values = [rng.randbytes(rng.choice((0, 1, 5, 200))) for _ in range(rng.choice((0, 1, 3, 40)))]
    raw, _ = encode_objects(dtype, values, (len(values),))
    count = len(values) if rng.random() < 0.7 else rng.choice((0, 1, 5, 2**20, 2**62))
    if dtype == STRING and rng.random() < 0.5:
        lengths = [number(rng) if rng.random() < 0.2 else len(value) for value in values]
        fixed = b"".join(n.to_bytes(4 if n < 2**32 else 8, "little") for n in lengths)
        raw = b"".join((*map(varint, lengths), mask(crc32c(fixed)).to_bytes(4, "little"), *values))
    return dtype, count, mangle(rng, raw) if rng.random() < 0.5 else raw


def _read_strings(made: tuple[str, int, bytes]) -> None:
    content_crc(*made)
    dtype, count, raw = made
    decode_objects(dtype, raw, count)


def make_name(rng: Random) -> str:
    """A path of a data shard or an index, or nearly."""
    numbers = (rng.choice(("", "-1", "00000", "00001", "99999", "9" * 6, "9" * 5000, "٣٣٣٣٣", "0000x")) for _ in "ab")
    name = rng.choice(PATHS) + ".data-" + "-of-".join(numbers)
    return name if rng.random() < 0.7 else rng.choice((name + ".index", name[rng.randint(0, len(name)) :], name[::-1]))


def _read_name(name: str) -> None:
    parse_shard_name(name)
    parse_index_name(name)
    inside(name, "input")
    checked_path(name)


class _Stream(io.BytesIO):
    def readall(self) -> bytes:
        """As pyarrow's streams call it."""
        return self.read()


@dataclass(frozen=True, slots=True)
class _OneFile:
    """A file system of Ray Train's that holds one pointer."""

    raw: bytes

    def open_input_stream(self, _path: str) -> _Stream:
        """The pointer."""
        return _Stream(self.raw)


@dataclass(frozen=True, slots=True)
class _TrainCheckpoint:
    filesystem: _OneFile
    path: str = "/storage/run/checkpoint_000000"


def _read_pointer(raw: bytes) -> None:
    pointer = from_train(_TrainCheckpoint(_OneFile(raw)))
    str(pointer.path)


def _make_tree(rng: Random) -> bytes:
    return _text(json.loads(corpus.metadata(5, {}))["trees"][0]["tree"].encode())(rng)


def _read_tree(raw: bytes) -> None:
    rebuild(raw.decode("utf-8", "replace"), corpus.arrays())


def _make_run(rng: Random) -> bytes:
    keys = [rng.randbytes(rng.randint(1, 9)) for _ in range(rng.randint(0, 5))]
    sizes = b"".join(len(key).to_bytes(4, "little") for key in keys)
    return mangle(rng, len(keys).to_bytes(4, "little") + sizes + sizes + b"".join(keys) * 2)


def _make_varint(rng: Random) -> bytes:
    return mangle(rng, varint(number(rng)))


def _read_timeline(raw: bytes) -> None:
    try:
        decode_timeline(raw)
    except MALFORMED as error:
        # What its readers leave out, with a warning.
        raise DamagedError(str(error)) from None


_POINTER = {"url": "/data/run", "step": 500, "prefix": "model.ckpt-500", "generation": 1}
_TIMELINE = corpus.directory("ours")["_ray_ckpt/events/e1-500.json"]

TARGETS = (
    Target("index", 30, make_index, lambda raw: Index.parse(raw, "input")),
    Target("table", 8, make_index, read_table),
    Target("run", 3, _make_run, decode_run),
    Target("varint", 1, _make_varint, lambda raw: read_varint(raw, 0)),
    Target("state", 10, make_state_file, parse_state_file),
    Target(
        "record",
        12,
        lambda rng: with_checksum(rng, encode_record(corpus.record(2))),
        lambda r: decode_record(r, "input"),
    ),
    Target(
        "claim",
        5,
        lambda rng: with_checksum(rng, encode_claim(corpus.claim(500, "model.ckpt-500"))),
        lambda r: decode_claim(r, "input"),
    ),
    Target("metadata", 10, _text(corpus.metadata(500, {0: b"abcd"})), lambda raw: decode(raw, "input")),
    Target("strings", 6, make_strings, _read_strings),
    Target("name", 4, make_name, _read_name),
    Target("pointer", 4, _text(json.dumps(_POINTER).encode()), _read_pointer),
    Target("tree", 5, _make_tree, _read_tree),
    Target("timeline", 2, _text(_TIMELINE), _read_timeline),
)
"""Readers of bytes; `directories.TARGETS` read files."""
