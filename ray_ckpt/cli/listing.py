"""``ray-ckpt ls``."""

from __future__ import annotations

from ray_ckpt.catalog import CheckpointInfo, checkpoints
from ray_ckpt.cli.options import Json, StorageOptions, Url, parse_storage_options
from ray_ckpt.cli.output import moment, note, print_json, print_table, size
from ray_ckpt.storage import locate


def ls(url: Url, as_json: Json = False, storage_option: StorageOptions = None) -> None:
    """List the committed checkpoints of a directory, newest last.

    None at all is no error here (exit code 0, and a note on stderr), unlike in show and verify.
    """
    found = checkpoints(url, storage_options=parse_storage_options(storage_option))
    if as_json:
        print_json({"url": locate(url).url, "checkpoints": found})
    elif found:
        columns = (">step", "time", ">size", ">shards", ">ranks", "prefix", "remarks")
        print_table(url, columns, [_row(info) for info in found])
    else:
        note(f"no checkpoint in {url}")


def _row(info: CheckpointInfo) -> tuple[object, ...]:
    remarks = ["superseded"] * info.superseded + ["written by TensorFlow"] * info.foreign
    ranks = info.world_size or "?"
    shards = info.num_shards
    return info.step, moment(info.time), size(info.bytes), shards, ranks, info.prefix, ", ".join(remarks)
