"""Graphs with one of each kind of variable that a Saver saves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def mixed(seed: float = 1.0) -> Any:
    """Build it in the default graph: ref, resource, partitioned, string, bfloat16 and other variables, a hash table.

    Values depend on ``seed``. Returns the op that initializes all of them.
    """
    import tensorflow as tf

    tf1 = tf.compat.v1

    def get(name: str, shape: tuple[int, ...], dtype: Any = tf.float32, **options: Any) -> Any:
        value = (np.arange(math.prod(shape)) * seed).reshape(shape)
        start = tf.cast(tf.constant(value), dtype)
        return tf1.get_variable(name, initializer=start, **options)

    get("resource", (4, 2), use_resource=True)
    get("ref", (3,), use_resource=False)
    get("half", (5,), tf.bfloat16, use_resource=True)
    get("flag", (2,), tf.bool, use_resource=False)
    get("complex", (2, 2), tf.complex64, use_resource=True)
    get("empty", (0, 3), use_resource=True)
    tf1.Variable(f"text{seed}\0", name="text", use_resource=True)
    tf1.Variable([b"a\0", f"{seed}".encode()], name="texts", use_resource=False)
    partitioned("rows", seed, 10, 3, tf1.fixed_size_partitioner(3), use_resource=True)
    partitioned("columns", seed, 3, 10, tf1.fixed_size_partitioner(4, axis=1), use_resource=False)
    tf1.train.get_or_create_global_step()
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1, name="table")
    fill = table.insert(tf.constant(["a", "b\0"]), tf.constant([int(seed), 2], tf.int64))
    return tf.group(tf1.global_variables_initializer(), tf1.tables_initializer(), fill)


def partitioned(name: str, seed: float, rows: int, columns: int, partitioner: Any, **options: Any) -> Any:
    """A partitioned variable of this shape."""
    import tensorflow as tf

    def initial(shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
        offset = partition_info.var_offset if partition_info else (0, 0)
        whole = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) * seed
        return tf.constant(whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])

    return tf.compat.v1.get_variable(name, (rows, columns), initializer=initial, partitioner=partitioner, **options)
