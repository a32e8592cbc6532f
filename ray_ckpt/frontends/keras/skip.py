"""A resumed epoch: batches that were trained on before are taken from the data, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray_ckpt.errors import UsageError


class Skip:
    """Stands in for ``model.train_function`` until ``batches`` batches have been taken from the data.

    Callbacks hear of each as of any other, with ``logs``. ``ahead``: batches to take before those, at once.
    Where there are none but those ahead, callbacks hear of nothing. ``first`` is called with the first batch,
    ``last`` once all are taken. It stays in place, so that callbacks can tell (`skipping`), until the first batch
    that is trained on.
    """

    def __init__(
        self,
        model: Any,
        *,
        batches: int,
        ahead: int,
        logs: Any,
        first: Callable[[Any], None] | None,
        last: Callable[[], None],
    ) -> None:
        self._model = model
        self._inner = model.train_function
        # `fit` makes a new one each time: by it a `fit` that failed is told from the next.
        self._history = model.history
        self._calls = math.ceil(batches / model.steps_per_execution)
        self._ahead = ahead
        self._logs = logs
        self._first = first
        self._last = last
        model.train_function = self

    def __call__(self, *args: Any) -> Any:
        """One step of the loop; the last argument is the iterator, the first one before it JAX's state."""
        if self._calls == 0 or self._model.history is not self._history:
            self.end()
            if self._ahead and self._model.history is self._history:
                self._take(args[-1], 0)
                self._last()
            return self._inner(*args)
        self._calls -= 1
        self._take(args[-1], self._model.steps_per_execution)
        if self._calls == 0:
            self._last()
        return self._logs if len(args) == 1 else (self._logs, *args[:-1])

    def end(self) -> None:
        """Put the real function back."""
        if self._model.train_function is self:
            self._model.train_function = self._inner

    def _take(self, iterator: Any, count: int) -> None:
        """Take those ahead and ``count`` batches."""
        ahead, self._ahead = self._ahead, 0
        found = [self._next(iterator) for _ in range(ahead + count)]
        # As in the real function, the last step of an epoch may find fewer batches, but not none.
        if _END not in found[: ahead + 1]:
            return
        if ahead:
            raise UsageError(
                f"the data ended after {found.index(_END)} batches, expected more than {ahead}: stream=True is for data"
                " that fit() does not begin anew with each epoch"
            )
        raise StopIteration

    def _next(self, iterator: Any) -> Any:
        """`_END`, or anything else: batches are not kept."""
        batch = next(iterator, _END)
        if batch is _END:
            return _END
        if self._first is not None:
            self._first(batch)
            self._first = None
        return None


_END = object()


def skipping(model: Any) -> bool:
    """Whether the batch that callbacks hear of now was not trained on in this `fit`."""
    return isinstance(model.train_function, Skip)
