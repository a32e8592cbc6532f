"""One of several workers that train in sessions of their own: a plain Ray actor."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.system.waiting import pause

ROWS = (6, 4)
"""How many rows of ``table`` each worker has."""

_PACE_S = 0.002


def values(step: int) -> dict[str, Any]:
    """What a checkpoint of both workers holds at a step."""
    return {
        "global_step": np.int64(step),
        "shared": np.full(3, step, np.float32),
        "own_0": np.full(2, step, np.float32),
        "own_1": np.full(2, 2 * step, np.float32),
        "rows_0": np.arange(8, dtype=np.float32).reshape(4, 2) + step,
        "both": np.arange(8, dtype=np.float32).reshape(4, 2) - step,
        "table": np.arange(20, dtype=np.float32).reshape(10, 2) + step,
    }


def build(rank: int, scale: float = 1.0) -> Any:
    """A worker's graph: what all have, what it alone has, its rows of a table, partitions; the train op."""
    import tensorflow as tf

    tf1 = tf.compat.v1
    start = values(0)
    shared = tf1.get_variable("shared", initializer=tf.constant(start["shared"]))
    own = tf1.get_variable(f"own_{rank}", initializer=tf.constant(start[f"own_{rank}"]))
    first = sum(ROWS[:rank])
    held = start["table"][first : first + ROWS[rank]]
    table = tf1.get_variable("part", initializer=tf.constant(held))
    table._set_save_slice_info(tf1.Variable.SaveSliceInfo("table", [10, 2], [first, 0], [ROWS[rank], 2]))
    updates = [shared.assign_add(tf.fill([3], scale)), own.assign_add([rank + 1.0] * 2)]
    updates.append(table.assign_add(tf.ones(held.shape)))
    if rank == 0:
        updates += [part.assign_add(tf.ones(part.shape)) for part in _partitioned("rows_0")]
    updates += [part.assign_sub(tf.ones(part.shape)) for part in _partitioned("both")]
    with tf.control_dependencies(updates):
        return tf1.train.get_or_create_global_step().assign_add(1)


def _partitioned(name: str) -> Any:
    """A variable of four rows in two partitions."""
    import tensorflow as tf

    start = values(0)[name]

    def initial(shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
        return tf.constant(start[partition_info.var_offset[0] :][: shape[0]])

    halves = tf.compat.v1.fixed_size_partitioner(2)
    return tf.compat.v1.get_variable(name, start.shape, initializer=initial, partitioner=halves)


class SessionWorker:
    """A process that trains one session after the other."""

    def train(
        self,
        rank: int,
        folder: str,
        last: int,
        *,
        restore: bool = False,
        scale: float = 1.0,
        stop_at: tuple[int, ...] = (),
        **cadence: Any,
    ) -> tuple[int, int]:
        """Train to step ``last`` or until told to stop; (first, last) value of the global step in this session.

        ``stop_at``: after the saves of these steps a listener of this worker asks for a stop.
        """
        import tensorflow as tf

        import ray_ckpt
        from tests.frontends.sessions import Listener

        tf1 = tf.compat.v1
        with tf.Graph().as_default():
            update = build(rank, scale)
            step = tf1.train.get_global_step()
            listeners = [Listener("A", [], stop_at)] if stop_at else []
            hook = ray_ckpt.CheckpointSaverHook(folder, rank=rank, world_size=2, listeners=listeners, **cadence)
            with tf1.train.MonitoredTrainingSession(
                checkpoint_dir=folder if restore else None,
                hooks=[hook],
                save_checkpoint_secs=None,
                save_summaries_steps=None,
                save_summaries_secs=None,
                log_step_count_steps=None,
            ) as session:
                first = now = session.run_step_fn(lambda step_context: step_context.session.run(step))
                while now < last and not session.should_stop():
                    now = session.run(update)
                    # The ranks take turns in being the faster one.
                    pause(_PACE_S * ((now // 4 + rank) % 2))
        return int(first), int(now)
