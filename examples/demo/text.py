"""The training data: the topics that Python's own ``help()`` prints, as characters."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.int32]]

_EVAL_SEED = 2**31


class Corpus:
    """A text as integers, and the batches of it. Every worker makes the same ones, whatever their number.

    ``tokens``: int32, one for each character. ``chars``: the character of each number, in sorted order.
    """

    def __init__(self, text: str) -> None:
        self.chars = sorted(set(text))
        number = {char: i for i, char in enumerate(self.chars)}
        self.tokens: Array = np.array([number[char] for char in text], np.int32)

    def batch(self, step: int, sequences: int, length: int) -> Array:
        """What training step ``step`` learns from: int32 ``[sequences, length + 1]``, a function of its arguments only.

        So training needs no saved position in its data: a job that goes on at a step sees what it would have seen.
        """
        starts = np.random.default_rng(step).integers(0, len(self.tokens) - length, sequences)
        found: Array = self.tokens[starts[:, None] + np.arange(length + 1)]
        return found

    def eval_batch(self, sequences: int, length: int) -> Array:
        """The fixed batch by which two states of the model are compared; the same form as `batch`."""
        return self.batch(_EVAL_SEED, sequences, length)


def python_help() -> Corpus:
    """About 460,000 characters of English and Python, shipped with CPython."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return Corpus("".join(topics[name] for name in sorted(topics)))
