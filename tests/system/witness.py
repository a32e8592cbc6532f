"""Somebody outside of a run who reads its directory all the time, and what must hold of all that was seen there."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import ray_ckpt
from ray_ckpt.errors import CheckpointError, NoCheckpointError
from ray_ckpt.log import decode_record
from ray_ckpt.types import PRIVATE_DIR, Checkpoint, LogRecord

_OFTEN_S = 0.1

Name = tuple[int, int]
"""(generation, step) of a checkpoint."""


class Witness:
    """Lists the checkpoints and keeps the log's records, in a thread of its own, until the end of a ``with``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listings: list[tuple[Checkpoint, ...]] = []
        self.records: dict[int, LogRecord] = {}
        self._raw: dict[str, bytes] = {}
        self.trouble: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness")

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._over.wait(_OFTEN_S):
            try:
                self._look()
            except Exception as error:
                self.trouble.append(repr(error))
                raise

    def _look(self) -> None:
        with contextlib.suppress(NoCheckpointError):
            listed = tuple(ray_ckpt.checkpoints(str(self.folder)))
            if not self.listings or self.listings[-1] != listed:
                self.listings.append(listed)
        for path in sorted((self.folder / PRIVATE_DIR / "log").glob("0*")):
            with contextlib.suppress(FileNotFoundError):
                self._keep(path)

    def _keep(self, path: Path) -> None:
        raw = path.read_bytes()
        if self._raw.setdefault(path.name, raw) != raw:
            self.trouble.append(f"record {path.name} was {self._raw[path.name]!r} and is {raw!r}")
        with contextlib.suppress(CheckpointError):
            self.records[int(path.name)] = decode_record(raw, str(path))

    # -- what was seen --------------------------------------------------------------------------------------

    def log(self, kind: str = "") -> list[LogRecord]:
        """The records in their order: all, or those of a kind."""
        return [r for _, r in sorted(self.records.items()) if kind in ("", r.kind)]

    def committed(self, generation: int) -> list[int]:
        """The steps that a start of the job committed."""
        return [r.step for r in self.log("commit") if r.live[-1].generation == generation]

    def check(self, max_to_keep: int) -> None:
        """Nothing that was ever listed was lost, and one coordinator at a time had the directory."""
        assert self.trouble == []
        self._check_log()
        self._check_listings(max_to_keep)
        damage = {r.checkpoint.step: r.damage for r in ray_ckpt.verify(str(self.folder)) if r.damage}
        assert damage == {}

    def _check_log(self) -> None:
        log = self.log()
        assert [r.sequence for r in log] == list(range(1, len(log) + 1))
        epochs = [r.epoch for r in log]
        assert epochs == sorted(epochs), f"two coordinators wrote in turns: epochs {epochs}"
        owners = {(r.epoch, r.owner) for r in log}
        assert len(owners) == len(set(epochs)), f"an epoch had two owners: {sorted(owners)}"
        for record in log:
            if record.kind == "commit":
                assert record.generation is not None
                assert record.live[-1].generation == record.generation.number, "a save of an older start"

    def _check_listings(self, max_to_keep: int) -> None:
        newest: list[Name] = []
        for before, after in zip(self.listings, self.listings[1:], strict=False):
            lost = {name_of(c) for c in before} - {name_of(c) for c in after}
            kept = [name_of(c) for c in after]
            for name in lost:
                newer = [n for n in kept if n > name]
                assert len(newer) >= max_to_keep, f"{name} was listed and is gone, {kept} are left"
        for listed in filter(None, self.listings):
            newest.append(name_of(listed[-1]))
        assert newest == sorted(newest), f"the newest checkpoint went back: {newest}"


def name_of(checkpoint: Checkpoint) -> Name:
    """What tells a checkpoint from all others of a directory."""
    return checkpoint.generation, checkpoint.step
