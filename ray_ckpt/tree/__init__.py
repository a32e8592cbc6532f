"""A user's state as named leaves and back.

Containers are dict, list, tuple, namedtuple, dataclass, None (no leaves) and whatever JAX has registered as a
pytree node; everything else is a leaf. A leaf's name is its path, escaped part by part and joined by "/":

- dict keys: a str as it is; int, bool, float and None as Python prints them ("3", "True", "0.5", "None").
  Other types of key are refused;
- list and tuple items: the index; namedtuple and dataclass items: the field's name; other nodes: JAX's key;
- in each part "%" becomes "%25", "/" becomes "%2F" and control characters become "%00" to "%1F" and "%7F". An
  empty part becomes "%-", and a state that is itself one leaf is named "%root": neither can come from another
  key, as "%" is otherwise followed by two digits.

A `Named` is a state whose keys are the names themselves.

Leaves come in the order in which their containers hold them. The JSON of the structure sorts dict items by
their part, so that it does not depend on the order of insertion.
"""

from ray_ckpt.tree.flat import Flat, flatten, named_leaves, rebuild, unflatten
from ray_ckpt.tree.names import ROOT_NAME, join_name
from ray_ckpt.tree.nodes import Named
from ray_ckpt.tree.stored import reading_structure
from ray_ckpt.tree.structure import Structure

__all__ = [
    "ROOT_NAME",
    "Flat",
    "Named",
    "Structure",
    "flatten",
    "join_name",
    "named_leaves",
    "reading_structure",
    "rebuild",
    "unflatten",
]
