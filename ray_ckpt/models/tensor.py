"""Tensors of a state without values, and the moments that optimizers keep beside the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ray_ckpt.bundle import dtype_of
from ray_ckpt.types import Shape

Axes = tuple[tuple[str, ...], ...]
"""For each dimension, the mesh axes that cut it, major first, as in a `jax.sharding.PartitionSpec`."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One array. ``dtype`` is a name of `bundle.dtypes`; dimensions beyond ``axes`` are not cut.

    ``uneven``: cut where the devices do not divide it, too, into blocks of equal size of which the last are shorter or
    empty: not for a jax.Array, but for hand-made slices (`ray_ckpt.Slice`) and as TorchRec cuts tables by rows.
    """

    name: str
    shape: Shape
    axes: Axes = ()
    dtype: str = "float32"
    uneven: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Model:
    """The parameters of a model and the state that is saved of its training."""

    name: str
    title: str
    parameters: tuple[Tensor, ...]
    optimizer: Callable[[Iterable[Tensor]], tuple[Tensor, ...]]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(tensor.size for tensor in self.parameters)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Parameters, optimizer and step."""
        params = tuple(replace(tensor, name=f"params/{tensor.name}") for tensor in self.parameters)
        return (*params, *self.optimizer(self.parameters), Tensor("step", (), dtype="int32"))


def nbytes_of_state(state: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state)


def adam(parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Adam's and AdamW's two moments of each parameter in float32 and the count, as `optax.adam` names them."""
    moments = ("mu", "nu")
    parameters = tuple(parameters)
    return (
        Tensor("opt_state/0/count", (), dtype="int32"),
        *(replace(t, name=f"opt_state/0/{m}/{t.name}", dtype="float32") for m in moments for t in parameters),
    )


def adafactor(parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Adafactor without momentum: sums along both dimensions of a matrix, the whole second moment of all else.

    As `optax.scale_by_factored_rms`, which factors what has two dimensions of 128 or more, the shorter first, and
    keeps one element for what a parameter does not have. No parameter has more than two dimensions.
    """
    found = [Tensor("opt_state/0/count", (), dtype="int32")]
    nothing = Tensor("", (1,))
    for tensor in parameters:
        parts = {"v_row": nothing, "v_col": nothing, "v": replace(tensor, dtype="float32")}
        if len(tensor.shape) == 2 and min(tensor.shape) >= 128:
            shorter = int(tensor.shape[1] < tensor.shape[0])
            parts = {"v_row": _along(tensor, shorter), "v_col": _along(tensor, 1 - shorter), "v": nothing}
        found += [replace(part, name=f"opt_state/0/{kind}/{tensor.name}") for kind, part in parts.items()]
    return tuple(found)


def _along(tensor: Tensor, dimension: int) -> Tensor:
    """One float32 for each index of a dimension, cut as it is."""
    only = slice(dimension, dimension + 1)
    return Tensor(tensor.name, tensor.shape[only], tensor.axes[only], uneven=tensor.uneven)


def rowwise_adagrad(parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """One float32 for each row of an embedding table ("emb/"), Adagrad's one an element for all else.

    As the optimizer "rwsadagrad" of github.com/facebookresearch/dlrm (``optim/rwsadagrad.py``).
    """
    found = (_along(tensor, 0) if tensor.name.startswith("emb/") else tensor for tensor in parameters)
    return tuple(replace(tensor, name=f"opt_state/sum/{tensor.name}") for tensor in found)
