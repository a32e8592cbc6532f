"""Index entries of one shard as one compact blob, and the merge of all into the index of a checkpoint.

A run: the number of entries, the lengths of its keys, those of its values (little-endian uint32 each), then
all keys, then all values. Each writer encodes and sorts its own, so that the merge does not decode a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from operator import itemgetter

import numpy as np

from ray_ckpt.bundle.coding import key_name
from ray_ckpt.bundle.entry import HEADER_KEY, encode_header
from ray_ckpt.bundle.table import Pair, write_table
from ray_ckpt.errors import DamagedError, StateError, UsageError

_LENGTH = np.dtype("<u4")


def encode_run(items: Iterable[Pair]) -> bytes:
    """One blob of (key, value) pairs, which must come sorted by key.

    Raises:
        StateError: a key comes twice; names the tensor.
        UsageError: the pairs are not sorted.
    """
    pairs = list(items)
    _check_order(pairs)
    lengths = [len(pairs), *(len(key) for key, _ in pairs), *(len(value) for _, value in pairs)]
    return b"".join(
        (
            np.array(lengths, _LENGTH).tobytes(),
            *(key for key, _ in pairs),
            *(value for _, value in pairs),
        )
    )


def decode_run(run: bytes) -> list[Pair]:
    """The (key, value) pairs of a blob.

    Raises:
        DamagedError: its lengths do not add up to its size.
    """
    count = int.from_bytes(run[: _LENGTH.itemsize], "little")
    head = _LENGTH.itemsize * (1 + 2 * count)
    if len(run) < max(head, _LENGTH.itemsize):
        raise DamagedError(f"a run of {count} index entries cannot have only {len(run)} bytes")
    lengths = np.frombuffer(run, _LENGTH, 2 * count, _LENGTH.itemsize).tolist()
    ends = list(accumulate(lengths, initial=head))
    if ends[-1] != len(run):
        raise DamagedError(f"a run of {count} index entries needs {ends[-1]} bytes, has {len(run)}")
    parts = [run[start:stop] for start, stop in pairwise(ends)]
    return list(zip(parts[:count], parts[count:], strict=True))


def merge_index(runs: Sequence[bytes], num_shards: int) -> bytes:
    """The whole ``.index`` file of a checkpoint of ``num_shards`` data shards.

    Raises:
        StateError: a key is in two runs; names the tensor.
        DamagedError: a run's lengths do not add up.
    """
    pairs = [pair for run in runs for pair in decode_run(run)]
    # Timsort finds the sorted runs and merges them: faster than a heap over Python iterators.
    pairs.sort(key=itemgetter(0))
    _check_order(pairs)
    if pairs and pairs[0][0] == HEADER_KEY:
        raise StateError("a tensor's name is empty: TensorFlow keeps the empty key for itself; name the leaf")
    return write_table(chain(((HEADER_KEY, encode_header(num_shards)),), pairs))


def _check_order(pairs: Sequence[Pair]) -> None:
    last: bytes | None = None
    for key, _ in pairs:
        if last is not None and key <= last:
            if key == last:
                raise StateError(f"{key_name(key)}: written twice; each name and each slice must have one writer")
            raise UsageError(f"index entries are not sorted: {key_name(key)} follows {key_name(last)}")
        last = key
