"""A restore target from a function that would make a fresh state, without making it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray_ckpt.errors import StateError
from ray_ckpt.leaves import PerWorker, Slice, Slices
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.target.match import bare, is_placeholder, stored_rule
from ray_ckpt.target.structure import StoredNames, foreign_containers, leaf_names, stored_tree
from ray_ckpt.tree import named_leaves, unflatten

ADVICE = "pass a state, or an abstract one (with jax.ShapeDtypeStruct leaves), as `like`"

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type)


def is_function(like: Any) -> bool:
    """True for what makes a state: jitted and otherwise wrapped functions too, containers that can be called not."""
    return isinstance(like, _FUNCTIONS) or (callable(like) and hasattr(like, "__wrapped__"))


def is_abstract(like: Any) -> bool:
    """True for what only says what a state would be: None, or a state with a leaf that has no value."""
    return like is None or any(map(is_placeholder, named_leaves(like).values()))


def why_not_containers(stored: StoredCheckpoint, rank: int, world_size: int) -> str:
    """Why the checkpoint alone cannot give this rank's containers back; "" if it can."""
    if stored.metadata is None:
        return "was not written by ray_ckpt and holds no structure"
    tree = stored_tree(stored.metadata, rank, world_size)
    if tree is None:
        return (
            f"was saved by {stored.metadata.world_size} workers with states of different structures, and this is"
            f" rank {rank} of {world_size}"
        )
    kinds = foreign_containers(tree)
    return f"holds containers that it cannot make ({', '.join(kinds)})" if kinds else ""


def from_function(stored: StoredCheckpoint, make: Callable[..., Any], rank: int, world_size: int) -> Any:
    """The abstract state that a function would return; None where the checkpoint alone says as much.

    A jitted function is always asked: only it knows the shardings.

    Raises:
        StateError: neither can be known without calling the function.
    """
    jax: Any = sys.modules.get("jax")
    is_jitted = jax is not None and hasattr(make, "eval_shape")
    why = why_not_containers(stored, rank, world_size) or _why_not_leaves(stored, rank, world_size)
    if not why and not is_jitted:
        return None
    if jax is None or stored.metadata is None:
        raise StateError(f"{stored.where} {why}, and a function is not called where there is a checkpoint: {ADVICE}")
    try:
        target = jax.eval_shape(make) if is_jitted else _traced(jax, make)
    except Exception as error:
        raise StateError(
            f"{stored.where} is to be restored to what {_name(make)} would make, but jax.eval_shape cannot tell what"
            f" that is ({type(error).__name__}: {str(error).partition(chr(10))[0]}): {ADVICE}"
        ) from error
    _check_placed(stored, target)
    return target


def _why_not_leaves(stored: StoredCheckpoint, rank: int, world_size: int) -> str:
    """Which leaf the function says more about than the checkpoint does; "" if there is none."""
    metadata = stored.metadata
    tree = stored_tree(metadata, rank, world_size)
    if metadata is None or tree is None:
        return ""
    per_worker = StoredNames.of(stored).per_worker
    for name in leaf_names(tree):
        tensors = per_worker.get(name, {(rank, world_size): name})
        own = tensors.get((rank, world_size))
        first = tensors[min(tensors)]
        # With JAX the function itself is asked, since its rule may be another one than was saved.
        if own is None and "jax" not in sys.modules and stored_rule(stored, first) == "first":
            own = first
        if own is None:
            return f"holds {name}, a value of each of {metadata.world_size} workers, not {world_size}"
        kind = metadata.kind(own)
        if "slice:" in kind:
            return f"holds {name}, which was a Slice"
        if "tf:variable" in kind:
            return f"holds {name}, which was a tf.Variable"
        if kind == "jax:global" and _spans_processes():
            return f"holds {name}, which was sharded over processes"
    return ""


def _traced(jax: Any, make: Callable[[], Any]) -> Any:
    """The state with abstract values where JAX would compute one, and all other leaves as they are."""
    made: list[Any] = []

    def arrays() -> dict[str, Any]:
        state = make()
        made.append(state)
        found = {name: _arrays_of(leaf) for name, leaf in named_leaves(state).items()}
        return {name: values for name, values in found.items() if isinstance(values[0], jax.core.Tracer)}

    abstract = jax.eval_shape(arrays)
    state = made[-1]
    values = {
        name: _marked(leaf, abstract[name]) if name in abstract else leaf for name, leaf in named_leaves(state).items()
    }
    return unflatten(state, values)


def _arrays_of(leaf: Any) -> list[Any]:
    """The leaf without its markers: one array, or those of the parts of a `Slices`."""
    if isinstance(leaf, PerWorker):
        return _arrays_of(leaf.value)
    return [part.array for part in leaf.parts] if isinstance(leaf, Slices) else [bare(leaf)]


def _marked(like: Any, values: list[Any]) -> Any:
    """The arrays inside the markers of ``like``."""
    if isinstance(like, PerWorker):
        return replace(like, value=_marked(like.value, values))
    if isinstance(like, Slices):
        return Slices(tuple(replace(part, array=array) for part, array in zip(like.parts, values, strict=True)))
    return replace(like, array=values[0]) if isinstance(like, Slice) else values[0]


def _check_placed(stored: StoredCheckpoint, target: Any) -> None:
    """A function that is only traced does not say how its arrays lie on other processes."""
    if stored.metadata is None or not _spans_processes():
        return
    for name, leaf in named_leaves(target).items():
        if stored.metadata.kind(name) == "jax:global" and getattr(leaf, "sharding", None) is None:
            raise StateError(
                f"{stored.where}: {name} was sharded over processes, and the function does not say how to place it:"
                f" {ADVICE} and shardings, or a function jitted with out_shardings"
            )


def _spans_processes() -> bool:
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.process_count() > 1


def _name(make: Callable[..., Any]) -> str:
    return getattr(make, "__qualname__", None) or repr(make)
