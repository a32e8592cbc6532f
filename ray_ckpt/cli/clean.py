"""``ray-ckpt clean``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ray_ckpt.catalog import open_for_reading
from ray_ckpt.cli.options import Json, StorageOptions, parse_age, parse_storage_options
from ray_ckpt.cli.output import moment, note, print_json, print_table, size
from ray_ckpt.cli.sweep import Sweep, default_segment_folder, find, find_segments, remove, remove_segments
from ray_ckpt.errors import UsageError
from ray_ckpt.snapshot import SegmentInfo

OptionalUrl = Annotated[str | None, typer.Argument(help="Checkpoint directory; may be left out with --segments.")]
Yes = Annotated[bool, typer.Option("--yes", help="Remove; without it nothing is changed.")]
Segments = Annotated[bool, typer.Option("--segments", help="Also unused snapshot memory on this host.")]
Folder = Annotated[Path | None, typer.Option("--segment-folder", help="Default: this user's in /dev/shm.")]
MinAge = Annotated[str, typer.Option("--min-age", help="Leave what is younger: 90s, 30m, 12h, 1d.")]

_Row = tuple[str, str, str, str]


def clean(
    url: OptionalUrl = None,
    yes: Yes = False,
    segments: Segments = False,
    segment_folder: Folder = None,
    min_age: MinAge = "1d",
    as_json: Json = False,
    storage_option: StorageOptions = None,
) -> None:
    """Show what dead attempts, readers and processes left behind; remove it with --yes."""
    if url is None and not segments:
        raise UsageError("name a checkpoint directory, or --segments for this host's snapshot memory, or both")
    min_age_s, now = parse_age(min_age), time.time()
    store = None if url is None else open_for_reading(url, parse_storage_options(storage_option))
    sweep = Sweep() if store is None else find(store, now, min_age_s)
    unused = find_segments(segment_folder or default_segment_folder(), now, min_age_s) if segments else []
    if yes:
        if store is not None:
            remove(store, sweep, now)
        unused = remove_segments(unused)
    if as_json:
        print_json(_document(url, yes, sweep, unused))
    else:
        _print(url, yes, sweep, unused)


def _rows(sweep: Sweep, unused: list[SegmentInfo]) -> Iterator[_Row]:
    for info in sweep.files:
        yield "orphan", info.path, size(info.nbytes), moment(info.modified)
    for claim in sweep.claims:
        yield "dead claim", claim.prefix, "", f"attempt {claim.attempt}"
    for info in sweep.pins:
        yield "expired pin", info.path, size(info.nbytes), moment(info.modified)
    for segment in unused:
        held = "of another version" if segment.state is None else segment.state.name.lower()
        held = f"step {segment.save.step}" if segment.save else held
        yield "segment", str(segment.path), size(segment.data_nbytes), f"{moment(segment.modified)}, {held}"


def _print(url: str | None, yes: bool, sweep: Sweep, unused: list[SegmentInfo]) -> None:
    rows = list(_rows(sweep, unused))
    if rows:
        print_table(url or "this host", ("what", "path", ">size", "since"), rows)
    for prefix in sweep.unknown:
        note(f"{prefix} stays: neither the log nor a claim accounts for it, so it may not be ours")
    total = sum(info.nbytes for info in sweep.files) + sum(segment.data_nbytes for segment in unused)
    if not rows:
        note("nothing to clean")
    elif yes:
        note(f"removed these {len(rows)}, {size(total)}")
    else:
        note(f"nothing was removed; with --yes these {len(rows)} go, {size(total)}")


def _document(url: str | None, yes: bool, sweep: Sweep, unused: list[SegmentInfo]) -> dict[str, object]:
    return {
        "url": url,
        "removed": yes,
        "orphans": sweep.files,
        "claims": sweep.claims,
        "pins": [info.path for info in sweep.pins],
        "unknown": sweep.unknown,
        "segments": [{"path": str(s.path), "nbytes": s.data_nbytes, "modified": s.modified} for s in unused],
    }
