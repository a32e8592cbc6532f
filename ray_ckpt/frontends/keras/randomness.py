"""The random states of a process that `keras.utils.set_random_seed` seeds, as JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator


def random_state() -> dict[str, Any]:
    """Python's, numpy's and Keras's global random state; layers' seed generators are variables of the model."""
    generator = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    return {
        "python": random.getstate(),
        "numpy": plain(np.random.get_state(legacy=False)),
        "keras": None if generator is None else plain(np.asarray(generator.state.numpy())),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """What `random_state` gave, also by way of JSON."""
    if state["keras"] is not None:
        # Making the generator draws from Python's, which is set after it.
        seed_generator.global_seed_generator().state.assign(np.asarray(state["keras"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])


def plain(value: Any) -> Any:
    """A value of dicts, lists, arrays and numbers as JSON has them."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return plain(value.numpy()) if hasattr(value, "numpy") else value
