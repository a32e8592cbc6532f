"""Restoring a state: what the target wants, what the checkpoint holds, one read of it all, and the state again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ray_ckpt.errors import MismatchError, StateError, UsageError
from ray_ckpt.restore import DEFAULT_BUDGET_NBYTES, DEFAULT_THREADS, Progress, StoredCheckpoint, collector_paused
from ray_ckpt.target.abstract import ADVICE, from_function, is_function, why_not_containers
from ray_ckpt.target.differences import SHOWN, near_miss
from ray_ckpt.target.match import Matcher
from ray_ckpt.target.structure import leaf_names, stored_tree
from ray_ckpt.target.values import read_values
from ray_ckpt.tree import named_leaves, rebuild, unflatten

logger = logging.getLogger(__name__)

Rename = Mapping[str, str] | Callable[[str], str]
_Assemble = Callable[[Mapping[str, Any]], Any]


def read_state(
    stored: StoredCheckpoint,
    like: Any,
    *,
    rank: int,
    world_size: int,
    partial: bool = False,
    rename: Rename | None = None,
    cast: bool = False,
    threads: int = DEFAULT_THREADS,
    budget_nbytes: int = DEFAULT_BUDGET_NBYTES,
    progress: Progress | None = None,
) -> Callable[[], Any]:
    """Read and verify the state of one rank of ``world_size``; what this returns builds it, and may be called once.

    It is restored bit for bit, however many ranks saved it and in which slices. ``like`` says what the state is to
    be, and only what it needs is read:

    - a state: the same containers come back, each leaf of the same type, dtype, sharding and markers. Variables
      are assigned in place, and only once everything else has been built; all else is new;
    - an abstract state, with `jax.ShapeDtypeStruct` leaves: arrays with their shardings, else on the default
      device;
    - a function that would make a fresh state. It is not called. Where the saved state was of dicts, lists and
      tuples it comes back as it was saved, JAX arrays on the default device; otherwise, and if it is jitted,
      `jax.eval_shape` tells what it would make (with the ``out_shardings`` of a jitted one);
    - None: what was saved, as above. A `Slice` comes back as the whole array, a variable as a tensor.

    Leaves must be those of the checkpoint, with their shapes and dtypes. ``partial`` lets leaves that the
    checkpoint lacks keep the target's value and ignores leaves that the target lacks. ``rename`` gives the
    checkpoint's name for the target's, of those leaves that it holds or as a function of each. ``cast`` converts
    numbers to the target's dtype: rounded to floating-point types, without a change of value to others.
    ``threads``, ``budget_nbytes``, ``progress``: see `restore.read_boxes`.

    Raises:
        MismatchError: target and checkpoint differ; lists how. When built: a value is not one of the target's type.
        StateError: a leaf of the target is nothing that a checkpoint holds, or a target is needed.
        UsageError: a rank that is none, or names to rename that the target does not have.
        DamagedError, ObjectMissingError, StorageError: as `restore.read_boxes`.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"rank must be in 0..world_size-1, found rank {rank} of world_size {world_size}")
    leaves, assemble = _target(stored, like, rank, world_size)
    with collector_paused():
        matcher = Matcher(stored, rank, world_size, partial, cast, _renamer(rename, leaves))
        matcher.match(leaves)
    _check(matcher, len(leaves))
    build = read_values(stored, matcher.plans, threads=threads, budget_nbytes=budget_nbytes, progress=progress)
    return lambda: assemble({**build(), **matcher.kept})


def _target(stored: StoredCheckpoint, like: Any, rank: int, world_size: int) -> tuple[dict[str, Any], _Assemble]:
    """The target's leaves by name, None for those that come as they were saved, and how to put them together."""
    if is_function(like):
        like = from_function(stored, like, rank, world_size)
    elif like is None and (why := why_not_containers(stored, rank, world_size)):
        raise StateError(f"{stored.where} {why}: {ADVICE}")
    tree = None if like is not None else stored_tree(stored.metadata, rank, world_size)
    if tree is not None:
        return dict.fromkeys(leaf_names(tree)), lambda values: rebuild(tree, values)
    return named_leaves(like), lambda values: unflatten(like, values)


def _renamer(rename: Rename | None, leaves: Collection[str]) -> Callable[[str], str]:
    if rename is None:
        return lambda name: name
    if callable(rename):
        return rename
    names = dict(rename)
    unknown = sorted(names.keys() - set(leaves))
    if unknown:
        hint = near_miss(unknown[0], leaves)
        raise UsageError(
            f"rename maps the target's names to the checkpoint's, but the target has no leaf {unknown[0]!r}"
            f"{f' ({hint})' if hint else ''}; {len(unknown)} of {len(names)} names are not its own"
        )
    return lambda name: names.get(name, name)


def _check(matcher: Matcher, num_leaves: int) -> None:
    """Raise what differs, or say what a partial restore leaves out.

    Raises:
        MismatchError: anything that was not allowed differs, or nothing at all is in both.
    """
    where = matcher.stored.where
    if matcher.differences:
        raise MismatchError(matcher.differences.text(where))
    if not matcher.partial:
        return
    spare = matcher.differences.spare
    if num_leaves and len(spare) == len(matcher.names.all):
        raise MismatchError(
            f"{where}: none of the target's {num_leaves} leaves is in the checkpoint, which holds"
            f" {_listed(spare)}: with partial=True nothing would be restored; give"
            " rename={target's name: checkpoint's name}"
        )
    if matcher.kept:
        logger.warning("%s: the target keeps its own value of %s", where, _listed(matcher.kept))
    if matcher.unused:
        logger.warning("%s: the target has no place for %s", where, _listed(matcher.unused))


def _listed(some: Collection[str]) -> str:
    names = sorted(some)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} leaves: {', '.join(names[:SHOWN])}{more}" if names else "no leaves"
