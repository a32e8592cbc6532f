"""A `fit` under MirroredStrategy, whole and resumed in the directory of the command line; prints both as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import keras
import tensorflow as tf

import ray_ckpt
from tests.frontends.keras_fits import data, fit, make_model, outcome


def main(path: str) -> None:
    """Two replicas, on two halves of this machine's processor."""
    (processor,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def started(seed: int, *callbacks: Any, **settings: Any) -> Any:
        keras.utils.set_random_seed(seed)
        with strategy.scope():
            model = make_model(jit_compile=False)

        def dataset() -> Any:
            return tf.data.Dataset.from_tensor_slices(data()).batch(8)

        return fit(callbacks, seed=seed, model=model, dataset=dataset, **settings)

    def backup() -> Any:
        return ray_ckpt.BackupAndRestore(path, 1, delete_checkpoint=False)

    whole = started(1)
    started(1, backup(), interrupt=(1, 2))
    resumed = started(2, backup())
    for model in (whole, resumed):
        values, history, _ = outcome(model)
        print(json.dumps({"weights": hashlib.sha256(b"".join(values)).hexdigest(), "history": history}))


if __name__ == "__main__":
    main(sys.argv[1])
