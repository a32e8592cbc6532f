"""The coordinator's actions against a store."""

from __future__ import annotations

from pathlib import Path

from ray_ckpt.coordinator.executor import Executor
from ray_ckpt.errors import SaveError
from ray_ckpt.protocol.flows import DeleteData
from ray_ckpt.storage import open_store


def _executor(folder: Path) -> Executor:
    def no_plan(_: object) -> None:
        raise SaveError("no save is under way")

    return Executor(open_store(folder), no_plan)  # type: ignore[arg-type]


def test_all_that_belongs_to_a_checkpoint_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    mine = ["model.ckpt-1.data-00000-of-00004", "model.ckpt-1.data-00003-of-00004", "model.ckpt-1.meta"]
    others = ["model.ckpt-1.data-00000-of-00001", "model.ckpt-11.meta", "model.ckpt-1.metadata", "model.ckpt-2.meta"]
    for name in (*mine, *others):
        (tmp_path / name).write_bytes(b"x")
    assert _executor(tmp_path).run(DeleteData("model.ckpt-1", "e000001-000001", 4)) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


def test_the_graph_of_an_attempt_lies_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "e000001-000002"
    folder.mkdir()
    for path in (folder / "model.ckpt-1.meta", tmp_path / "model.ckpt-1.meta"):
        path.write_bytes(b"x")
    assert _executor(tmp_path).run(DeleteData("e000001-000002/model.ckpt-1", "e000001-000002", 4)) is None
    assert [p.name for p in tmp_path.rglob("*.meta")] == ["model.ckpt-1.meta"]
    assert (tmp_path / "model.ckpt-1.meta").exists()
