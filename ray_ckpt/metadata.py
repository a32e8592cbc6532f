"""A checkpoint's own description: the JSON in the scalar string tensor `types.METADATA_KEY` of its bundle.

Keys: ``format_version`` (int), ``step``, ``attempt``, ``generation``, ``world_size``, ``time``, ``trees``
(list of {"ranks", "tree"}, one for each different structure), ``kinds`` (leaf name -> kind, only where it is
not "numpy"), ``chunks`` (shard number -> base64 of little-endian uint32 crc32c) and ``writers`` (list of
{"shard_id", "host", "nbytes", "seconds"}). Keys that this version does not know are ignored and missing lists
are empty, so that older and newer writers of the same format version understand each other.

``chunks`` of a shard: for each entry of more than `types.CHUNK_NBYTES` bytes, strings among them, in the
order of their offsets, one checksum for each `types.CHUNK_NBYTES` stored bytes, the last of them of the rest.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_ckpt import strict_json
from ray_ckpt.errors import CheckpointError, DamagedError
from ray_ckpt.strict_json import integer
from ray_ckpt.types import FORMAT_VERSION

DEFAULT_KIND = "numpy"


@dataclass(frozen=True, slots=True)
class RankTree:
    """The container structure (see `tree`) that these ranks' states share."""

    ranks: tuple[int, ...]
    tree: str


@dataclass(frozen=True, slots=True)
class WriterNote:
    """Who wrote one data shard, how many bytes, and how long that took."""

    shard_id: int
    host: str
    nbytes: int
    seconds_s: float


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a checkpoint says of itself beyond the tensors that TensorFlow sees.

    ``kinds`` lists the leaves whose `LeafSpec.kind` is not "numpy"; ``chunks`` maps a shard's number to its
    chunk checksums (see the module).
    """

    step: int
    attempt: str
    generation: int
    world_size: int
    time: float
    trees: tuple[RankTree, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    chunks: Mapping[int, bytes] = field(default_factory=dict)
    writers: tuple[WriterNote, ...] = ()
    format_version: int = FORMAT_VERSION

    def kind(self, name: str) -> str:
        """What the leaf was in the saved state: one of `LeafSpec.kind`."""
        return self.kinds.get(name, DEFAULT_KIND)

    def tree_of(self, rank: int) -> str | None:
        """The structure of one rank's state as JSON, or None if that rank had none."""
        return next((entry.tree for entry in self.trees if rank in entry.ranks), None)


def encode(metadata: Metadata) -> bytes:
    """The JSON, as the one element of a scalar string tensor; equal metadata gives equal bytes."""
    document = {
        "format_version": metadata.format_version,
        "step": metadata.step,
        "attempt": metadata.attempt,
        "generation": metadata.generation,
        "world_size": metadata.world_size,
        "time": metadata.time,
        "trees": [{"ranks": list(entry.ranks), "tree": entry.tree} for entry in metadata.trees],
        "kinds": {name: kind for name, kind in metadata.kinds.items() if kind != DEFAULT_KIND},
        "chunks": {str(shard): base64.b64encode(crcs).decode() for shard, crcs in metadata.chunks.items() if crcs},
        "writers": [
            {"shard_id": w.shard_id, "host": w.host, "nbytes": w.nbytes, "seconds": w.seconds_s}
            for w in metadata.writers
        ],
    }
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def decode(raw: bytes, source: str) -> Metadata:
    """The metadata in these bytes; ``source`` names the checkpoint in errors.

    Raises:
        CheckpointError: a newer version of this package wrote it in a format this one cannot read.
        DamagedError: not the JSON that `encode` writes.
    """
    try:
        document = strict_json.parse(raw)
        version = integer(document["format_version"])
        if version <= FORMAT_VERSION:
            return _from_document(document, version)
    except strict_json.MALFORMED as error:
        raise DamagedError(
            f"{source}: its metadata is not readable ({type(error).__name__}: {error}); restore another checkpoint"
        ) from None
    raise CheckpointError(
        f"{source}: written in format version {version}, this ray_ckpt reads up to {FORMAT_VERSION}:"
        " upgrade ray_ckpt to read it"
    )


def _from_document(document: Mapping[str, Any], version: int) -> Metadata:
    return Metadata(
        step=integer(document["step"]),
        attempt=str(document["attempt"]),
        generation=integer(document["generation"]),
        world_size=integer(document["world_size"]),
        time=float(document["time"]),
        trees=tuple(
            RankTree(tuple(integer(rank) for rank in entry["ranks"]), str(entry["tree"]))
            for entry in document.get("trees", ())
        ),
        kinds={str(name): str(kind) for name, kind in document.get("kinds", {}).items()},
        chunks={
            integer(shard): base64.b64decode(crcs, validate=True) for shard, crcs in document.get("chunks", {}).items()
        },
        writers=tuple(
            WriterNote(integer(w["shard_id"]), str(w["host"]), integer(w["nbytes"]), float(w["seconds"]))
            for w in document.get("writers", ())
        ),
        format_version=version,
    )
