"""From an opened checkpoint to a user's state on one rank, whatever cut and number of ranks it was saved with."""

from ray_ckpt.target.abstract import is_abstract, is_function
from ray_ckpt.target.state import Rename, read_state

__all__ = ["Rename", "is_abstract", "is_function", "read_state"]
