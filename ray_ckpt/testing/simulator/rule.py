"""The rule of a restore, on the bare objects: no code of the package is used here."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

LOG = "_ray_ckpt/log/"


@lru_cache(maxsize=4096)
def parsed(data: bytes) -> Any:
    """The JSON in these bytes."""
    return json.loads(data)


@lru_cache(maxsize=4096)
def _crc(data: bytes) -> int:
    return zlib.crc32(data)


def damage_of(objects: Mapping[str, bytes], prefix: str) -> str | None:
    """What keeps a checkpoint from being read: a missing index, a missing or changed shard; None if it is whole."""
    index = objects.get(f"{prefix}.index")
    if index is None:
        return f"{prefix}.index is missing"
    for path, crc in parsed(index)["shards"].items():
        data = objects.get(path)
        if data is None:
            return f"{path} is missing"
        if _crc(data) != crc:
            return f"{path} does not match its checksum"
    return None


def top_record(objects: Mapping[str, bytes]) -> Any:
    """The record with the highest number, None without a log."""
    paths = [path for path in objects if path.startswith(LOG)]
    return parsed(objects[max(paths)]) if paths else None


def newest(record: Any) -> Any:
    """The checkpoint a restore takes by default; None if there is none."""
    usable = [c for c in record["live"] if not c["superseded"]]
    return usable[-1] if usable else None
