"""A state's tensors from a file, for ``ray-ckpt plan``."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ray_ckpt.bundle import dtype_of
from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.models import MODELS, Tensor

FORM = '{"name": {"shape": [8, 4], "dtype": "float32", "axes": ["fsdp", ["data", "tensor"]]}}'


def read_state(model: str) -> tuple[str, tuple[Tensor, ...]]:
    """Title and state of a published model, or of a JSON or YAML file of tensors (`FORM`; dtype and axes may lack).

    Raises:
        UsageError: no such model or file, or a file of another form; names the tensor.
    """
    if model in MODELS:
        found = MODELS[model]()
        return f"{found.title}, {found.num_parameters:,} parameters", found.state
    path = Path(model)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UsageError(f"no model {model!r}; there are {', '.join(MODELS)}, or pass a .json or .yaml file: {FORM}")
    document = _document(path)
    if not isinstance(document, dict) or not document:
        raise UsageError(f"{path}: expected an object with one item a tensor, as in {FORM}")
    return path.name, tuple(_tensor(f"{path}: {name}", str(name), item) for name, item in document.items())


def _document(path: Path) -> Any:
    # Ray brings it; it has no types, and its import is not needed for anything else.
    yaml: Any = import_module("yaml")
    try:
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; pass a file of tensors or one of {', '.join(MODELS)}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _tensor(where: str, name: str, item: Any) -> Tensor:
    item = item if isinstance(item, dict) else {"shape": item}
    shape, axes, dtype = item.get("shape"), item.get("axes", []), item.get("dtype", "float32")
    unknown = sorted(item.keys() - {"shape", "dtype", "axes"}, key=str)
    if unknown or not _is_shape(shape) or not _is_axes(axes):
        told = f"unknown {', '.join(map(str, unknown))}" if unknown else f"shape {shape!r}, axes {axes!r}"
        raise UsageError(f"{where}: found {told}; expected as in {FORM}")
    try:
        dtype_of(str(dtype))
    except StateError as error:
        raise UsageError(f"{where}: {error}") from None
    names = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in axes]
    return Tensor(name, tuple(shape), tuple(names), str(dtype))


def _is_axes(axes: Any) -> bool:
    """One entry a dimension, as in a `jax.sharding.PartitionSpec`: none, a name, or some."""
    if not isinstance(axes, list):
        return False
    names = [name for axis in axes for name in (axis if isinstance(axis, list) else [axis])]
    return all(isinstance(name, str) for name in names if name is not None)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
