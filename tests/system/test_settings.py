"""Settings that cannot work are refused by name before anything is started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import ray_ckpt
from ray_ckpt.checkpointer import Timeouts
from ray_ckpt.checkpointer.settings import ensure_ray, who_am_i
from ray_ckpt.errors import MissingExtraError, RayCkptError, UnsafeStoreError, UsageError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"save_steps": 5, "save_secs": 5.0}, "save_steps or save_secs, not both"),
    ({"save_steps": 0}, "save_steps must be positive, found 0"),
    ({"save_steps": -3}, "save_steps must be positive, found -3"),
    ({"save_steps": 2.5}, "save_steps must be a whole number, found 2.5"),
    ({"save_steps": "5"}, "save_steps must be a number, found '5'"),
    ({"save_steps": True}, "save_steps must be a number, found True"),
    ({"save_secs": 0.0}, "save_secs must be positive"),
    ({"save_secs": float("nan")}, "save_secs must be positive, found nan"),
    ({"max_to_keep": 0}, "max_to_keep must be positive"),
    ({"keep_every_steps": -1}, "keep_every_steps must be positive"),
    ({"keep_every_hours": -1.0}, "keep_every_hours must be positive"),
    ({"keep_before": -1}, "keep_before must be the number of a generation, or 0, found -1"),
    ({"keep_before": True}, "keep_before must be the number of a generation, or 0, found True"),
    ({"keep_hours_grid": True}, "keep_hours_grid must be a time in seconds since the epoch, found True"),
    ({"keep_hours_from": 1.0, "keep_hours_grid": 1.0}, "give keep_hours_from or keep_hours_grid, not both"),
    ({"keep_hours_from": float("nan")}, "keep_hours_from must be a time in seconds since the epoch, found nan"),
    ({"basename": ""}, "basename must be a file name"),
    ({"basename": "a/b"}, "basename must be a file name such as \"model.ckpt\", found 'a/b'"),
    ({"basename": "a\n"}, "basename must be a file name"),
    ({"basename": 5}, "basename must be a file name"),
    ({"max_failures": 0}, "max_failures must be positive"),
    ({"stride": 0}, "stride must be positive"),
    ({"snapshots": 0}, "snapshots must be positive, found 0"),
    ({"writers_per_host": 0}, "writers_per_host must be positive, found 0"),
    ({"writers_per_host": 1.5}, "writers_per_host must be a whole number, found 1.5"),
    ({"delete_grace_s": -1.0}, "delete_grace_s must not be negative"),
    ({"overlap": "hope"}, "overlap must be one of wait, skip, coalesce, found 'hope'"),
    ({"on_error": "ignore"}, 'on_error must be "warn" or "raise", found \'ignore\''),
    ({"timeouts": Timeouts(save_s=-1)}, r"timeouts\.save_s must be positive, found -1"),
    ({"timeouts": Timeouts(start_s=0)}, r"timeouts\.start_s must be positive, found 0"),
    ({"timeouts": 5.0}, r"timeouts must be a ray_ckpt\.Timeouts, found 5\.0"),
    ({"rank": 0}, "give rank and world_size together, found rank=0 and world_size=None"),
    ({"world_size": 2}, "give rank and world_size together"),
    ({"rank": 2, "world_size": 2}, "found rank=2 and world_size=2"),
    ({"rank": -1, "world_size": 2}, "found rank=-1 and world_size=2"),
    ({"rank": 0, "world_size": 0}, "found rank=0 and world_size=0"),
    ({"rank": "0", "world_size": 1}, "rank must be a whole number, found '0'"),
]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a test would start Ray."""
    monkeypatch.setattr("ray_ckpt.checkpointer.checkpointer.ensure_ray", lambda: pytest.fail("Ray was started"))


@pytest.mark.parametrize(("settings", "text"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ray_ckpt.Checkpointer(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "kind", "text"),
    [
        ("nope://bucket/run", UsageError, "unknown scheme nope://"),
        ("memory://run", UsageError, r"memory://run lives in the memory of one process"),
        ("github://a:b@/x", (UnsafeStoreError, UsageError), "github"),
        (None, UsageError, "without a URL .* is not in a training function"),
        (7, UsageError, "must be a path or a URL .*found 7"),
        ("gs:/bucket/run", UsageError, "did you mean gs://bucket/run"),
        ("", UsageError, "the checkpoint directory is an empty string"),
    ],
)
def test_wrong_places(url: Any, kind: type[RayCkptError], text: str) -> None:
    with pytest.raises(kind, match=text):
        ray_ckpt.Checkpointer(url)


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocker:
        """Finds nothing of s3fs, as if it were not installed."""

        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.partition(".")[0] == "s3fs":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [n for n in sys.modules if n.partition(".")[0] == "s3fs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker, *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"pip install ray_ckpt\[s3\]"):
        ray_ckpt.Checkpointer("s3://bucket/run", save_steps=1)


def test_neither_cadence_is_fine_until_ray_is_needed(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="Ray was started"):
        ray_ckpt.Checkpointer(tmp_path)


def test_rank_and_size_without_any_framework() -> None:
    assert who_am_i(None, None) == (0, 1)
    assert who_am_i(3, 4) == (3, 4)


def test_a_misspelt_option_of_restore() -> None:
    with pytest.raises(TypeError, match="castt"):
        ray_ckpt.Checkpointer.restore(None, castt=True)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("variable", "expected"), [("", "local"), ("127.0.0.1:6379", None)], ids=["nobody's", "a submitted job's"]
)
def test_which_ray_is_joined(monkeypatch: pytest.MonkeyPatch, variable: str, expected: str | None) -> None:
    asked: list[str | None] = []
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda address=None, **_: asked.append(address))
    ensure_ray()
    assert asked == [expected]
