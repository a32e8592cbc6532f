"""Reading a committed checkpoint: any boxes of any tensors, ranged, concurrent, bounded and checksummed."""

from ray_ckpt.restore.check import Damage, check_bytes
from ray_ckpt.restore.collector import collector_paused
from ray_ckpt.restore.engine import DEFAULT_BUDGET_NBYTES, DEFAULT_THREADS, Progress, read_boxes
from ray_ckpt.restore.jobs import Wanted, lent
from ray_ckpt.restore.snapshots import MappedSource, Part, Source, open_snapshot
from ray_ckpt.restore.stored import StoredCheckpoint, check_extents, open_checkpoint

__all__ = [
    "DEFAULT_BUDGET_NBYTES",
    "DEFAULT_THREADS",
    "Damage",
    "MappedSource",
    "Part",
    "Progress",
    "Source",
    "StoredCheckpoint",
    "Wanted",
    "check_bytes",
    "check_extents",
    "collector_paused",
    "lent",
    "open_checkpoint",
    "open_snapshot",
    "read_boxes",
]
