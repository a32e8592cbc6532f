"""Whole directories with one to three hostile files, and snapshots, read in every way that the package reads them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from click.testing import CliRunner
from typer.main import get_command

from ray_ckpt import catalog, log
from ray_ckpt.cli import app
from ray_ckpt.cli.sweep import find, find_segments, remove
from ray_ckpt.errors import RayCkptError
from ray_ckpt.log.records import record_path
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.snapshot import drop_unused, scan
from ray_ckpt.storage import Store, open_store
from ray_ckpt.target import read_state
from ray_ckpt.testing.fuzz import corpus
from ray_ckpt.testing.fuzz.hostile import PATHS, edit_json, mangle
from ray_ckpt.testing.fuzz.snapshots import make_layout, make_segment, read_snapshots
from ray_ckpt.testing.fuzz.tables import mutate_index
from ray_ckpt.testing.fuzz.targets import Target, indexes, make_state_file, with_checksum
from ray_ckpt.timeline import timelines
from ray_ckpt.types import PRIVATE_DIR

_NOW = 2e9
_MEMORY = "memory://fuzz/run"


@dataclass(frozen=True, slots=True)
class Directory:
    """Files to write, links to make (path -> where to), and the way it is read then."""

    files: corpus.Files
    links: dict[str, str]
    read: Callable[[str], Any]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(map(len, self.files.values()))


def _catalog(url: str) -> None:
    """Everything `ray_ckpt` itself offers; what one says does not keep the next from being tried."""
    for look in (catalog.checkpoints, catalog.verify, timelines, catalog.load, lambda u: catalog.load(u, 500)):
        try:
            look(url)
        except RayCkptError:
            continue


def _restore(url: str) -> None:
    """The state as it was saved, rebuilt from what the checkpoint says of itself."""
    store = open_store(url)
    for checkpoint in log.live_checkpoints(store):
        for rank, world in ((0, 2), (0, 3)):
            try:
                read_state(open_checkpoint(store, checkpoint), None, rank=rank, world_size=world)()
            except RayCkptError:
                continue


def _coordinator(url: str) -> None:
    """What a coordinator reads and repairs at its start."""
    store = open_store(url)
    for act in (
        log.read_head,
        log.repair_state_file,
        log.list_claims,
        lambda s: log.list_pins(s, _NOW),
        log.read_last_good,
    ):
        try:
            act(store)
        except RayCkptError:
            continue


def _sweep(url: str) -> None:
    """What `ray-ckpt clean --yes` does, which must leave the live checkpoints alone."""
    store = open_store(url)
    kept = _live_files(store)
    remove(store, find(store, _NOW, 0.0), _NOW)
    lost = kept - {info.path for info in store.list("")}
    if lost:
        raise AssertionError(f"the sweep removed {sorted(lost)[:3]}, which a live checkpoint has")


def _live_files(store: Store) -> set[str]:
    try:
        prefixes = [f"{checkpoint.prefix}." for checkpoint in log.live_checkpoints(store)]
    except RayCkptError:
        return set()
    return {info.path for info in store.list("") if info.path.startswith(tuple(prefixes))}


@cache
def _cli() -> Any:
    return get_command(app)


def _command(*arguments: str) -> Callable[[str], None]:
    """A command, whose errors are one line and an exit code."""

    def run(url: str) -> None:
        result = CliRunner().invoke(_cli(), [arguments[0], url, *arguments[1:]])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    return run


_READS = (
    *(_catalog,) * 4,
    *(_restore,) * 4,
    *(_coordinator,) * 2,
    *(_sweep,) * 3,
    *(_command("ls"), _command("show"), _command("show", "--json"), _command("verify"), _command("clean")),
    _command("clean", "--yes", "--min-age", "0s"),
)


def _make(rng: Random) -> Directory:
    kind = rng.choice(("ours",) * 12 + ("foreign",) * 4 + ("large",))
    files = dict(corpus.directory(kind))
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Each file once: the next mutation would have to be of what the last one has left.
        left = [path for path, raw in files.items() if raw is corpus.directory(kind).get(path)]
        described = [path for path in left if ".data-" not in path]
        path = rng.choice(described if described and rng.random() < 0.8 else left)
        if rng.random() < 0.08:
            files[_elsewhere(rng, path)] = files.pop(path)
        else:
            files[path] = _hostile(rng, path, files[path])
    if kind != "foreign" and rng.random() < 0.4:
        files |= _described(rng)
    return Directory(files, {}, rng.choice(_READS))


def _hostile(rng: Random, path: str, raw: bytes) -> bytes:
    """Another content for a file, by what it is."""
    if path.endswith(".index"):
        return mutate_index(rng, raw, indexes())
    if path == "checkpoint":
        return make_state_file(rng)
    if path.startswith((f"{PRIVATE_DIR}/log/", f"{PRIVATE_DIR}/claims/")) and raw.startswith(b"{"):
        return with_checksum(rng, raw)
    if path.startswith(f"{PRIVATE_DIR}/") and raw.startswith(b"{"):
        return edit_json(rng, raw)
    return mangle(rng, raw)


def _described(rng: Random) -> corpus.Files:
    """A checkpoint, sound but for its own description, which lies under checksums that are right."""
    text = corpus.metadata(500, {0: b"abcd"})
    return corpus.bundle("model.ckpt-500", 500, described=edit_json(rng, text))


def _elsewhere(rng: Random, path: str) -> str:
    """The same file under a name that lies."""
    hostile = quote(rng.choice(PATHS), safe="", errors="replace")[:200].strip(".") or "x"
    folder, _, name = path.rpartition("/")
    number = rng.choice(("0" * 20, "9" * 20, "1" * 30, "-1", "٣" * 20))
    return rng.choice((f"{folder}/{hostile}", f"{folder}/{hostile}.{name}", record_path(1)[:-20] + number)).lstrip("/")


def _make_local(rng: Random) -> Directory:
    """The same with links and pipes among the files."""
    made = _make(rng)
    for _ in range(rng.choice((0, 1, 2))):
        path = rng.choice(list(made.files))
        del made.files[path]
        made.links[path] = rng.choice(("../canary", "missing", path.rpartition("/")[2], "/dev/zero", "pipe", "."))
        if not made.files:
            break
    return made


class Places:
    """Where directories are written before they are read: in this process's memory, or in ``folder``."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def in_memory(self, made: Directory) -> None:
        """Write the files into the memory store, which holds nothing else, and read them."""
        backend: Any = open_store(_MEMORY).backend  # type: ignore[attr-defined]
        for info in backend.list(""):
            backend.delete(info.path)
        for path, raw in made.files.items():
            backend.put(path, memoryview(raw))
        made.read(_MEMORY)

    def on_disk(self, made: Directory) -> None:
        """Write the files and links into the folder, and read them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path, raw in made.files.items():
            full = self.folder / path
            full.parent.mkdir(parents=True, exist_ok=True)
            full.write_bytes(raw)
        for path, target in made.links.items():
            full = self.folder / path
            full.parent.mkdir(parents=True, exist_ok=True)
            if target == "pipe":
                os.mkfifo(full)
            else:
                full.symlink_to(target)
        made.read(str(self.folder))

    def snapshots(self, made: corpus.Files) -> None:
        """Write segments and layouts into the folder of a run, and read them as agents and the command do."""
        shutil.rmtree(self.folder, ignore_errors=True)
        run = self.folder / "run"
        run.mkdir(parents=True, mode=0o700)
        for name, raw in made.items():
            (run / name).write_bytes(raw)
            (run / name).chmod(0o600)
        read_snapshots(run)
        scan(run)
        find_segments(self.folder, _NOW, 0.0)
        drop_unused(self.folder, _NOW, _NOW)


@cache
def real_snapshot() -> corpus.Files:
    """A segment and its layout."""
    with tempfile.TemporaryDirectory() as folder:
        corpus.snapshot(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _make_snapshot(rng: Random) -> corpus.Files:
    files = dict(real_snapshot())
    for name in list(files):
        if name.endswith(".segment"):
            files[name] = make_segment(rng, files[name])
        elif rng.random() < 0.5:
            files[name] = make_layout(rng, files[name])
    return files


def targets(folder: str) -> tuple[Target, ...]:
    """Those that read files; ``folder`` is theirs."""
    places = Places(folder)
    return (
        Target("directory", 6, _make, places.in_memory),
        Target("local", 2, _make_local, places.on_disk),
        Target("snapshot", 3, _make_snapshot, places.snapshots),
    )
