"""What a checkpoint says of the states it was saved from: their structure, and leaves that each worker had."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.leaves.base import PER_WORKER_PREFIX
from ray_ckpt.metadata import Metadata
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.tree import ROOT_NAME, join_name, reading_structure

_PER_WORKER = re.compile(r"(?s)(.*)/\.per_worker/(\d{5,})-of-(\d{5,})")
_REBUILT = frozenset({"dict", "list", "tuple", "named"})
_TF_BOOKKEEPING = frozenset({"_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"})
"""What `tf.train.Checkpoint` adds of its own; no user's state has a place for it."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """The leaves of a checkpoint: of one value for all workers, and of one for each.

    ``per_worker``: name of the leaf -> (rank, number of workers) -> name of the tensor.
    """

    plain: frozenset[str]
    per_worker: Mapping[str, Mapping[tuple[int, int], str]]

    @classmethod
    def of(cls, stored: StoredCheckpoint) -> StoredNames:
        """Those of an opened checkpoint, without what TensorFlow's own saver adds for itself."""
        plain: set[str] = set()
        per_worker: dict[str, dict[tuple[int, int], str]] = {}
        for name in stored.names:
            if stored.metadata is None:
                if name not in _TF_BOOKKEEPING:
                    plain.add(name)
            elif stored.metadata.kind(name).startswith(PER_WORKER_PREFIX) and (match := _PER_WORKER.fullmatch(name)):
                per_worker.setdefault(match[1], {})[int(match[2]), int(match[3])] = name
            else:
                plain.add(name)
        return cls(frozenset(plain), per_worker)

    @property
    def all(self) -> set[str]:
        """The names of all leaves."""
        return {*self.plain, *self.per_worker}


def expected_names(names: StoredNames, metadata: Metadata | None, rank: int, world_size: int) -> set[str]:
    """The leaves that a target of this rank must have, to be as strict as can be.

    All of them where the saved states were of one structure; this rank's own where they differed (as with
    pipeline parallelism); none where they differed and the ranks are others now.
    """
    if metadata is None or len(metadata.trees) <= 1:
        return names.all
    if metadata.world_size != world_size:
        return set()
    tree = metadata.tree_of(rank)
    return names.all if tree is None else set(leaf_names(tree))


def stored_tree(metadata: Metadata | None, rank: int, world_size: int) -> str | None:
    """The structure of this rank's state as JSON; None if none can be told to be it."""
    if metadata is None:
        return None
    if len(metadata.trees) == 1:
        return metadata.trees[0].tree
    return metadata.tree_of(rank) if metadata.world_size == world_size else None


def leaf_names(tree: str) -> list[str]:
    """The names of the leaves of a structure that `tree.flatten` described. Raises `DamagedError` if it is none."""
    with reading_structure():
        return list(_leaf_names(json.loads(tree), ""))


def foreign_containers(tree: str) -> list[str]:
    """The types of the containers that `tree.rebuild` cannot make, sorted. Raises `DamagedError` if it is none."""
    with reading_structure():
        return sorted({kind for kind in _kinds(json.loads(tree)) if kind not in _REBUILT})


def _leaf_names(node: Any, name: str) -> Iterator[str]:
    if isinstance(node, str):
        yield name or ROOT_NAME
        return
    if isinstance(node, dict) and "named" in node:
        yield from (key for key, _ in node["named"])
        return
    for part, child in _children(node):
        yield from _leaf_names(child, join_name(name, part))


def _kinds(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from node
        for _, child in _children(node):
            yield from _kinds(child)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a container's JSON, as the names of leaves have them but for escapes, and its children."""
    if node is None:
        return
    ((kind, items),) = node.items()
    for index, item in enumerate(items):
        if kind in ("list", "tuple"):
            yield str(index), item
        else:
            key, child = item
            yield str(key), child
