"""A Keras job that may be killed at any moment: it learns the next character of Python's own help texts.

Run it, kill it, run it again with the same --dir: it goes on at the batch it was saved at, and ends with the same
weights as if nothing had happened. The best model stays in <dir>/models/best.

    python examples/keras_fit.py --dir /tmp/keras-run --epochs 3 --save-freq 50
    ray job submit --working-dir . -- python examples/keras_fit.py --config examples/configs/keras_fit.yaml
"""

from __future__ import annotations

import hashlib
import json
import os
import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import ray_ckpt
from examples.config import from_command
from examples.job import join, log_steps
from ray_ckpt.frontends.keras import load_variables

CONTEXT = 16
"""Characters that the model sees of what it continues."""


@dataclass(frozen=True)
class Config:
    """``dir``: directory or bucket of the run. ``save_freq``: batches between two saves. ``hidden``: the width."""

    dir: str
    epochs: int = 3
    save_freq: int = 50
    samples: int = 20_000
    hidden: int = 128


def characters(count: int) -> tuple[Any, Any, int]:
    """int32 [count, CONTEXT] and the character that follows each, int32 [count]; the number of different ones."""
    text = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    chars = sorted(set(text))
    number = {char: i for i, char in enumerate(chars)}
    tokens = np.array([number[char] for char in text], np.int32)
    starts = np.random.default_rng(0).integers(0, len(tokens) - CONTEXT, count)
    return tokens[starts[:, None] + np.arange(CONTEXT)], tokens[starts + CONTEXT], len(chars)


def make_model(vocabulary: int, width: int) -> Any:
    """A small network with dropout, so that the random state matters."""
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((CONTEXT,), dtype="int32"),
            layers.Embedding(vocabulary, 16),
            layers.Flatten(),
            layers.Dense(width, activation="relu"),
            layers.Dropout(0.1),
            layers.Dense(vocabulary),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def main() -> None:
    """Train to the end, from wherever the run before got to."""
    options = from_command(Config, __doc__.split("\n", 1)[0])
    log_steps()
    join()
    keras.utils.set_random_seed(0)
    x, y, vocabulary = characters(options.samples)
    model = make_model(vocabulary, options.hidden)
    best = ray_ckpt.ModelCheckpoint(f"{options.dir}/models", monitor="val_accuracy", max_to_keep=2)
    backup = ray_ckpt.BackupAndRestore(f"{options.dir}/backup", options.save_freq, delete_checkpoint=False)

    def say(epoch: int, logs: Any) -> None:
        print(f"epoch {epoch}, {int(model.optimizer.iterations)} batches", flush=True)

    begin = keras.callbacks.LambdaCallback(on_epoch_begin=say)
    callbacks = [backup, best, begin]
    model.fit(x, y, batch_size=64, epochs=options.epochs, validation_split=0.1, verbose=0, callbacks=callbacks)

    weights = hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in model.variables)).hexdigest()
    print(f"weights {weights[:16]} after {int(model.optimizer.iterations)} batches")
    print(f"history {json.dumps(model.history.history)}")
    load_variables(model, best.best_url)
    loss, accuracy = model.evaluate(x[-2000:], y[-2000:], verbose=0)
    step = ray_ckpt.checkpoints(best.best_url)[-1].step
    print(f"best checkpoint: step {step}, accuracy {accuracy:.3f}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
