"""Pure planning: who writes what for a save, and which stored pieces a restore reads."""

from ray_ckpt.plan.divide import VARIABLE, make_plan, not_tf_readable
from ray_ckpt.plan.reslice import PieceIndex, intersections

__all__ = ["VARIABLE", "PieceIndex", "intersections", "make_plan", "not_tf_readable"]
