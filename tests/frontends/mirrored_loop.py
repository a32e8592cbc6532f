"""A training loop under `tf.distribute.MultiWorkerMirroredStrategy`, for Ray Train's workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LENGTH = 1000


def train(config: dict[str, Any]) -> None:
    """Train up to step ``config["steps"]``, from the newest checkpoint in ``config["url"]``.

    Each worker leaves what it restored and what it ended with in ``config["notes"]``.
    """
    import ray.train
    import tensorflow as tf

    import ray_ckpt

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        weights = tf.Variable(tf.random.normal((LENGTH,)))
        seen = tf.Variable(
            0.0, synchronization=tf.VariableSynchronization.ON_READ, aggregation=tf.VariableAggregation.SUM
        )
    rank = ray.train.get_context().get_world_rank()
    mine = tf.Variable(rank)
    data = iter(tf.data.Dataset.range(100))
    checkpoint = tf.train.Checkpoint(weights=weights, seen=seen, mine=mine, data=data)

    @tf.function
    def update(number: Any) -> None:
        def on_replica() -> None:
            context = tf.distribute.get_replica_context()
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.ones((LENGTH,)))
            weights.assign_add(total * tf.cast(number, tf.float32))
            seen.assign_add(1.0)

        strategy.run(on_replica)

    with ray_ckpt.Checkpointer(config["url"], save_steps=2) as ckpt:
        ckpt.restore(checkpoint)
        begun = weights.numpy().tolist()
        for step in range((ckpt.restored_step or 0) + 1, config["steps"] + 1):
            update(next(data))
            ckpt.step(step, checkpoint)
    note = {
        "world": [ckpt.rank, ckpt.world_size],
        "restored": ckpt.restored_step,
        "begun": begun,
        "weights": weights.numpy().tolist(),
        "seen": float(seen.read_value()),
        "mine": int(mine),
        "next": int(next(data)),
    }
    (Path(config["notes"]) / f"{rank}.json").write_text(json.dumps(note))
