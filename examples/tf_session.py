"""A MonitoredTrainingSession job that may be killed at any moment: it learns the next character of Python's help texts.

Run it, kill it, run it again with the same --dir: it goes on at the step it was saved at. Of a program that uses
TensorFlow's own hook, only the line with `ray_ckpt.CheckpointSaverHook` differs.

    python examples/tf_session.py --dir /tmp/session-run --steps 3000 --save-steps 500
    ray job submit --working-dir . -- python examples/tf_session.py --config examples/configs/tf_session.yaml

The directory may be a bucket too (gs://..., s3://...): where TensorFlow cannot open it, the hook restores the session.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import ray_ckpt
from examples.config import from_command
from examples.job import join, log_steps

v1 = tf.compat.v1

CONTEXT = 16
"""Characters that the model sees of what it continues."""

BATCH = 64


@dataclass(frozen=True)
class Config:
    """``dir``: directory or bucket of the run. ``save_steps``: steps between two saves. ``hidden``: the width."""

    dir: str
    steps: int = 3000
    save_steps: int = 500
    hidden: int = 128


class Text:
    """The topics that Python's own ``help()`` prints, as numbers of characters."""

    def __init__(self) -> None:
        text = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
        self.chars = sorted(set(text))
        number = {char: i for i, char in enumerate(self.chars)}
        self.tokens = np.array([number[char] for char in text], np.int32)

    def batch(self, step: int) -> Any:
        """int32 [BATCH, CONTEXT + 1], a function of the step only: a job that goes on sees what it would have seen."""
        starts = np.random.default_rng(step).integers(0, len(self.tokens) - CONTEXT, BATCH)
        return self.tokens[starts[:, None] + np.arange(CONTEXT + 1)]


class Model:
    """A small network; its embedding lies in two partitions, which are slices of one tensor in the checkpoint."""

    def __init__(self, vocabulary: int, width: int) -> None:
        self.step = v1.train.get_or_create_global_step()
        self.batch = v1.placeholder(tf.int32, (None, CONTEXT + 1))
        halves = v1.fixed_size_partitioner(2)
        embedding = v1.get_variable("embedding", (vocabulary, 16), partitioner=halves)
        seen = tf.nn.embedding_lookup(embedding, self.batch[:, :-1])
        hidden = self._dense("hidden", tf.reshape(seen, (-1, CONTEXT * 16)), width)
        logits = self._dense("logits", tf.nn.relu(hidden), vocabulary)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(self.batch[:, -1], logits)
        self.loss = tf.reduce_mean(losses)
        with tf.control_dependencies([v1.train.AdamOptimizer(1e-3).minimize(self.loss, self.step)]):
            self.train = self.step.read_value()

    def _dense(self, name: str, inputs: Any, width: int) -> Any:
        weights = v1.get_variable(f"{name}/weights", (inputs.shape[-1], width))
        return inputs @ weights + v1.get_variable(f"{name}/bias", (width,), initializer=v1.zeros_initializer())


class Announce(v1.train.CheckpointSaverListener):  # type: ignore[misc, name-defined]
    """Says which steps are safe: the checkpoint is committed when this is called."""

    def after_save(self, session: Any, global_step_value: Any) -> None:
        print(f"saved step {global_step_value}", flush=True)


def train(config: Config) -> None:
    """Train to the last step, from wherever the run before got to."""
    v1.set_random_seed(0)
    text = Text()
    model = Model(len(text.chars), config.hidden)
    # Without blocking=False, a hook whose listener has an `after_save` waits for each commit.
    hook = ray_ckpt.CheckpointSaverHook(
        config.dir, save_steps=config.save_steps, listeners=[Announce()], blocking=False
    )
    with v1.train.MonitoredTrainingSession(
        checkpoint_dir=None if "://" in config.dir else config.dir,
        hooks=[hook],
        save_checkpoint_secs=None,
        save_summaries_steps=None,
        save_summaries_secs=None,
    ) as session:
        step = session.run_step_fn(lambda step_context: step_context.session.run(model.step))
        print(f"begins at step {step}", flush=True)
        while step < config.steps and not session.should_stop():
            step, loss = session.run([model.train, model.loss], {model.batch: text.batch(step)})
            if step % config.save_steps == 0:
                print(f"step {step}: loss {loss:.3f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = from_command(Config, __doc__.split("\n", 1)[0], arguments)
    log_steps()
    join()
    with tf.Graph().as_default():
        train(options)


if __name__ == "__main__":
    main()
