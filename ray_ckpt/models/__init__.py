"""States that need no memory: shapes and dtypes of published models, how a mesh cuts them, and what a save of them is.

Parameters are counted as published (see `published`), and optimizers as their libraries keep them.
"""

from ray_ckpt.models.estimate import Outlook, Rates, outlook
from ray_ckpt.models.mesh import HostMesh, layouts_of, unsharded
from ray_ckpt.models.published import MODELS
from ray_ckpt.models.tensor import Model, Tensor, nbytes_of_state

__all__ = [
    "MODELS",
    "HostMesh",
    "Model",
    "Outlook",
    "Rates",
    "Tensor",
    "layouts_of",
    "nbytes_of_state",
    "outlook",
    "unsharded",
]
