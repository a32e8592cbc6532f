"""A Keras model's state as named leaves: variables of model, optimizer and metrics by their paths."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ray_ckpt.bundle import dtype_of
from ray_ckpt.catalog import open_for_reading, with_checkpoint
from ray_ckpt.errors import MismatchError, NoCheckpointError, UsageError
from ray_ckpt.leaves import PerWorker, per_worker_name
from ray_ckpt.restore import StoredCheckpoint, read_boxes
from ray_ckpt.tree import Named
from ray_ckpt.types import Box

MONITOR = "keras/monitor"
"""Leaf of `ModelCheckpoint`: JSON with the best value so far."""

TRAINING = "keras/training"
"""Leaf of `BackupAndRestore`: JSON with the position in the training, the same on all workers."""

_SEED = "seed_generator_state"
"""Keras's name of a seed generator's variable."""

_COUNTER = re.compile(r"_\d+(?=_|/|$)")


def check_built(model: Any) -> None:
    """Make sure that all variables of model and optimizer exist. Raises `UsageError`."""
    if not model.built:
        raise UsageError(
            f"the model {model.name!r} has no variables yet: build it before fit(), by an Input layer or by calling it"
            " on a batch"
        )
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def variables(model: Any) -> dict[str, Any]:
    """The `keras.Variable` objects by name: "model/<path>" with the seed generators' states, "optimizer/<path>".

    Where Keras gives one path twice, the second is "<path>.1".
    """
    optimizer = [] if model.optimizer is None else model.optimizer.variables
    return {**_named("model", model.variables), **_named("optimizer", optimizer)}


def metrics(model: Any) -> dict[str, Any]:
    """The variables of the metrics that are built, "metrics/<path>"."""
    return _named("metrics", model.metrics_variables)


def _named(group: str, found: Sequence[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for variable in found:
        name, count = f"{group}/{variable.path}", 0
        while name in named:
            count += 1
            name = f"{group}/{variable.path}.{count}"
        named[name] = variable
    return named


def values(named: Mapping[str, Any]) -> Named:
    """The backend's arrays: variables of TensorFlow, arrays of JAX."""
    return Named({name: variable.value for name, variable in named.items()})


def own_names(named: Mapping[str, Any], world_size: int) -> list[str]:
    """The variables of which each of several workers has a value of its own: metrics and seed generators.

    Those that a distribution spreads over the workers are one variable.
    """
    if world_size == 1:
        return []
    own = [name for name, v in named.items() if name.startswith("metrics/") or v.name == _SEED]
    return [name for name in own if not _is_distributed(named[name].value)]


def _is_distributed(value: Any) -> bool:
    tf = sys.modules.get("tensorflow")
    if tf is not None and isinstance(value, tf.distribute.DistributedValues):
        return True
    return not getattr(value, "is_fully_addressable", True)


def mark(leaves: dict[str, Any], own: Collection[str]) -> None:
    """Make those of ``own`` leaves of each worker; with another number of workers all get the first one's."""
    for name in own:
        leaves[name] = PerWorker(leaves[name], on_resize="first")


def bare(leaf: Any) -> Any:
    """What `mark` marked."""
    return leaf.value if isinstance(leaf, PerWorker) else leaf


def assign(named: Mapping[str, Any], restored: Mapping[str, Any]) -> None:
    """Give the variables their restored values; TensorFlow's have them already, as those were assigned in place."""
    for name, variable in named.items():
        value = bare(restored[name])
        if value is not variable.value:
            variable.assign(value)


def forms(named: Mapping[str, Any]) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of each variable, for `blanks`."""
    return [(name, str(v.dtype), list(map(int, v.shape))) for name, v in named.items()]


def blanks(stored: Sequence[tuple[str, str, Sequence[int]]]) -> dict[str, Any]:
    """Arrays to read variables into that do not exist yet."""
    return {name: np.empty(tuple(shape), dtype_of(dtype)) for name, dtype, shape in stored}


def renamed(own: Sequence[str], stored: Sequence[str]) -> dict[str, str]:
    """The stored name of each variable, where they differ by no more than the numbers that Keras counts up.

    A model that is built a second time in one process has a "dense_3" for its "dense_1". Variables
    correspond by their order then. {}: the names are the same, or differ otherwise.
    """
    if set(own) == set(stored) or len(own) != len(stored):
        return {}
    pairs = list(zip(own, stored, strict=True))
    return dict(pairs) if all(_COUNTER.sub("", a) == _COUNTER.sub("", b) for a, b in pairs) else {}


def described(stored: StoredCheckpoint, leaf: str) -> dict[str, Any]:
    """The JSON of this leaf.

    Raises:
        UsageError: the checkpoint is of another writer.
        DamagedError, StorageError: it cannot be read.
    """
    if leaf not in stored.names:
        writer = "ModelCheckpoint" if leaf == MONITOR else "BackupAndRestore"
        raise UsageError(f"{stored.where} was not saved by {writer}: give each callback a directory of its own")
    text: Any = np.empty((), object)
    read_boxes(stored, [(leaf, Box.whole(()), text)])
    found: dict[str, Any] = json.loads(text[()])
    return found


def load_variables(
    model: Any,
    url: str,
    step: int | None = None,
    *,
    optimizer: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Give a built model the variables that one of the callbacks saved: of ``step``, or of the newest checkpoint.

    ``optimizer=False`` leaves the optimizer as it is. Of what each worker saved, it is rank 0's. Needs no Ray.

    Raises:
        MismatchError: model and checkpoint differ; lists how.
        UsageError: the model is not built, or the checkpoint is of neither callback.
        NoCheckpointError, DamagedError, StorageError: as `ray_ckpt.load`.
    """
    check_built(model)
    named = variables(model)
    arrays = with_checkpoint(open_for_reading(url, storage_options), step, lambda stored: _arrays(stored, named))
    for name, variable in named.items():
        if optimizer or name.startswith("model/"):
            variable.assign(arrays[name])


def _arrays(stored: StoredCheckpoint, named: Mapping[str, Any]) -> dict[str, Any]:
    """The stored arrays by the names of the model's variables."""
    description = described(stored, MONITOR if MONITOR in stored.names else TRAINING)
    if description.get("finished"):
        raise NoCheckpointError(f"{stored.where} is of a training that has ended: its variables were given up")
    names = {name: _tensor_name(stored, description, name) for name in description["variables"]}
    by_name = renamed(list(named), list(names))
    found = {name: by_name.get(name, name) for name in named}
    tensors = {name: stored.tensor(tensor) for name, tensor in names.items()}
    wrong = [f"{name}: not in the checkpoint" for name, other in found.items() if other not in tensors]
    wrong += [f"{other}: not in the model" for other in sorted(tensors.keys() - set(found.values()))]
    for name, dtype, shape in forms({name: named[name] for name, other in found.items() if other in tensors}):
        tensor = tensors[found[name]]
        if (tensor.dtype, list(tensor.shape)) != (dtype, shape):
            wrong.append(f"{name}: expected {dtype}{shape}, found {tensor.dtype}{list(tensor.shape)}")
    if wrong:
        raise MismatchError(f"{stored.where} is not of this model: {'; '.join(wrong[:20])}")
    arrays = blanks([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
    read_boxes(stored, [(names[name], Box.whole(array.shape), array) for name, array in arrays.items()])
    return {name: arrays[other] for name, other in found.items()}


def _tensor_name(stored: StoredCheckpoint, description: Mapping[str, Any], name: str) -> str:
    if name not in description["own"] or stored.metadata is None:
        return name
    return per_worker_name(name, 0, stored.metadata.world_size)
