"""Live arrays -> host memory that outlives the process: segments, their tables, and the copy into them."""

from ray_ckpt.snapshot.folder import (
    SegmentInfo,
    default_folder,
    drop_unused,
    in_use,
    is_foreign,
    private_folder,
    reclaim,
    scan,
)
from ray_ckpt.snapshot.process import ProcessId
from ray_ckpt.snapshot.segment import WHOLE, Segment, SegmentState
from ray_ckpt.snapshot.table import Entry, SaveId, Sums, Table, chunks_in, decode_table
from ray_ckpt.snapshot.take import SegmentTooSmallError, needed_nbytes, take_snapshot

__all__ = [
    "WHOLE",
    "Entry",
    "ProcessId",
    "SaveId",
    "Segment",
    "SegmentInfo",
    "SegmentState",
    "SegmentTooSmallError",
    "Sums",
    "Table",
    "chunks_in",
    "decode_table",
    "default_folder",
    "drop_unused",
    "in_use",
    "is_foreign",
    "needed_nbytes",
    "private_folder",
    "reclaim",
    "scan",
    "take_snapshot",
]
