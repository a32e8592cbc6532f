"""Who did what when in the saves of a directory, for people and pictures; nothing depends on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt import strict_json
from ray_ckpt.catalog import open_for_reading
from ray_ckpt.errors import ObjectMissingError
from ray_ckpt.types import PRIVATE_DIR

logger = logging.getLogger(__name__)

_FOLDER = f"{PRIVATE_DIR}/events"


def timeline_path(attempt: str) -> str:
    """Where the timeline of one save lies in its directory."""
    return f"{_FOLDER}/{attempt}.json"


@dataclass(frozen=True, slots=True)
class SnapshotSpan:
    """One rank's copy into snapshot memory: from ``due``, when its `step()` began, to ``sealed``."""

    rank: int
    due: float
    sealed: float
    trigger: str


@dataclass(frozen=True, slots=True)
class ShardSpan:
    """One data shard's way into storage; ``tries`` before it failed."""

    writer: int
    rank: int
    host: str
    tries: int
    nbytes: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One committed save. All times are in seconds since the epoch, each by the clock of the host it names."""

    step: int
    generation: int
    attempt: str
    prefix: str
    opened: float
    committed: float
    snapshots: tuple[SnapshotSpan, ...]
    shards: tuple[ShardSpan, ...]


def timelines(url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> list[Timeline]:
    """The saves of a directory in the order of their commits; a deleted checkpoint's is gone with it.

    What cannot be read is left out with a warning.

    Raises:
        UsageError, MissingExtraError: not a URL that can be opened.
        StorageError: the storage failed.
    """
    store = open_for_reading(url, storage_options)
    found = []
    for info in store.list(_FOLDER):
        try:
            found.append(decode_timeline(store.read(info.path)))
        except ObjectMissingError:
            # Retention has deleted it meanwhile.
            continue
        except strict_json.MALFORMED as error:
            logger.warning("%s/%s is not a timeline, it is left out: %r", store.url, info.path, error)
    return sorted(found, key=lambda timeline: (timeline.committed, timeline.attempt))


def decode_timeline(raw: bytes) -> Timeline:
    """One save's timeline from its JSON, as the coordinator writes it.

    Raises:
        One of `strict_json.MALFORMED`: it is none.
    """
    fields = strict_json.parse(raw)
    return Timeline(
        step=strict_json.integer(fields["step"]),
        generation=strict_json.integer(fields["generation"]),
        attempt=str(fields["attempt"]),
        prefix=str(fields["prefix"]),
        opened=float(fields["opened"]),
        committed=float(fields["committed"]),
        snapshots=tuple(
            SnapshotSpan(strict_json.integer(s["rank"]), float(s["due"]), float(s["sealed"]), str(s["trigger"]))
            for s in fields["snapshots"]
        ),
        shards=tuple(_shard(s) for s in fields["shards"]),
    )


def _shard(fields: dict[str, Any]) -> ShardSpan:
    began = float(fields["began"])
    return ShardSpan(
        writer=strict_json.integer(fields["writer"]),
        rank=strict_json.integer(fields["rank"]),
        host=str(fields["host"]),
        tries=strict_json.integer(fields["try"]),
        nbytes=strict_json.integer(fields["nbytes"]),
        began=began,
        ended=began + float(fields["seconds"]),
    )
