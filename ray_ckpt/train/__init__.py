"""Ray Train: who this worker is, where its run lies, reports that carry pointers, and from those to the data."""

from ray_ckpt.train.context import home, identity
from ray_ckpt.train.hand_over import hand_over
from ray_ckpt.train.place import Place, place_of
from ray_ckpt.train.pointer import Pointer, from_train
from ray_ckpt.train.report import Reporter

__all__ = ["Place", "Pointer", "Reporter", "from_train", "hand_over", "home", "identity", "place_of"]
