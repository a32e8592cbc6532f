"""File names of a checkpoint: ``PREFIX.index``, ``PREFIX.data-00003-of-00013`` and, of a session, ``PREFIX.meta``."""

from __future__ import annotations

import re

from ray_ckpt.errors import UsageError

_SHARD = re.compile(r"(?s:(?P<prefix>.*))\.data-(?P<shard>[0-9]{5,10})-of-(?P<of>[0-9]{5,10})")
_INDEX_SUFFIX = ".index"


def index_name(prefix: str) -> str:
    """Path of the index; TensorFlow takes a checkpoint for present exactly when this file is there."""
    return prefix + _INDEX_SUFFIX


def graph_name(prefix: str) -> str:
    """Path of the MetaGraphDef that `tf.train.Saver` puts beside a checkpoint."""
    return prefix + ".meta"


def shard_name(prefix: str, shard_id: int, num_shards: int) -> str:
    """Path of one data shard.

    Raises:
        UsageError: the shard is not one of ``num_shards``.
    """
    if not 0 <= shard_id < num_shards:
        raise UsageError(f"{prefix}: shard {shard_id} is not one of the {num_shards} shards")
    return f"{prefix}.data-{shard_id:05d}-of-{num_shards:05d}"


def parse_shard_name(path: str) -> tuple[str, int, int] | None:
    """(prefix, shard_id, num_shards) of a data shard's path, or None for any other path."""
    match = _SHARD.fullmatch(path)
    if match is None:
        return None
    prefix, shard_id, num_shards = match["prefix"], int(match["shard"]), int(match["of"])
    if shard_id >= num_shards or shard_name(prefix, shard_id, num_shards) != path:
        return None
    return prefix, shard_id, num_shards


def parse_index_name(path: str) -> str | None:
    """The prefix of an index's path, or None for any other path."""
    return path[: -len(_INDEX_SUFFIX)] if path.endswith(_INDEX_SUFFIX) else None
