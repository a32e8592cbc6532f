"""The coordinator's real `Executor` over the simulated store; shards and indexes hold a small model of theirs.

A shard is JSON of [[name, offset, shape, token], ...]; the token stands for the bytes: who copied them at which step.
An index is JSON of {"shards": {path: crc32 of the shard}, "entries": [...]}.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

from ray_ckpt.bundle import index_name, shard_name
from ray_ckpt.coordinator.executor import Executor
from ray_ckpt.protocol import flows
from ray_ckpt.storage import Store
from ray_ckpt.types import ShardReport


def encode_shard(entries: list[Any]) -> bytes:
    """The object of one shard."""
    return json.dumps(entries).encode()


def shard_run(data: bytes) -> bytes:
    """What a shard's report says of its bytes."""
    return json.dumps({"crc": zlib.crc32(data), "entries": json.loads(data)}).encode()


def metadata_shard(save: Any) -> ShardReport:
    """The report of the coordinator's own shard of a save."""
    order = save.order
    data = encode_shard([["_ray_ckpt", [], [], f"metadata of {save.attempt}"]])
    number = order.num_shards - 1
    path = shard_name(save.prefix, number, order.num_shards)
    return ShardReport(
        attempt=save.attempt,
        writer=save.num_writers,
        attempt_try=0,
        shard_id=number,
        path=path,
        nbytes=len(data),
        run=shard_run(data),
        chunks=b"",
        seconds_s=0.0,
        host="",
    )


def index_of(save: Any, metadata: ShardReport) -> bytes:
    """The merged index of a save."""
    shards = [*(save.shards[w] for w in sorted(save.shards)), metadata]
    runs = {s.path: json.loads(s.run) for s in shards}
    crcs = {path: run["crc"] for path, run in runs.items()}
    return json.dumps({"shards": crcs, "entries": [e for run in runs.values() for e in run["entries"]]}).encode()


def perform(io: flows.Io, now: float, agents: dict[str, str]) -> Callable[[Store], Any]:
    """The call that carries an action out; what it needs of the changing `SaveState` is fixed now."""
    if isinstance(io, flows.PutMetadata):
        return _put_metadata(io)
    if isinstance(io, flows.PutIndex):
        return _put_index(io)
    return lambda store: Executor(store, _no_plan, lambda: now, lambda: agents).run(io)


def _no_plan(_: Any) -> NoReturn:
    raise NotImplementedError("the simulation has its own model of the bundle")


def _put_metadata(io: flows.PutMetadata) -> Callable[[Store], Any]:
    report = metadata_shard(io.save)
    data = encode_shard(json.loads(report.run)["entries"])

    def run(store: Store) -> ShardReport:
        store.put(report.path, data)
        return report

    return run


def _put_index(io: flows.PutIndex) -> Callable[[Store], Any]:
    path, data = index_name(io.save.prefix), index_of(io.save, io.metadata)
    nbytes: int = len(data) + sum(s.nbytes for s in io.save.shards.values())

    def run(store: Store) -> int:
        store.put(path, data)
        return nbytes

    return run
