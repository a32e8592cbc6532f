"""Live arrays -> host memory that outlives the process: segments, their tables, and the copy into them."""

from ray_ckpt.snapshot.folder import SegmentInfo, default_folder, drop_empty, in_use, reclaim, scan
from ray_ckpt.snapshot.process import ProcessId
from ray_ckpt.snapshot.segment import Segment, SegmentState
from ray_ckpt.snapshot.table import Entry, SaveId, Table
from ray_ckpt.snapshot.take import SegmentTooSmallError, needed_nbytes, take_snapshot

__all__ = [
    "Entry",
    "ProcessId",
    "SaveId",
    "Segment",
    "SegmentInfo",
    "SegmentState",
    "SegmentTooSmallError",
    "Table",
    "default_folder",
    "drop_empty",
    "in_use",
    "needed_nbytes",
    "reclaim",
    "scan",
    "take_snapshot",
]
