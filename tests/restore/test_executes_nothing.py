"""A checkpoint is data: what looks like code in it comes back as the bytes that it is."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_ckpt
from ray_ckpt.errors import StateError
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.storage import open_store
from tests.restore.make import commit


class Planted:
    """Runs a command wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


LOAD = """
import sys
seen = []
FORBIDDEN = ("pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen", "os.exec")
import ray_ckpt
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import open_store
from ray_ckpt.target import read_state
url = sys.argv[1]
ray_ckpt.load(url)
sys.addaudithook(lambda event, arguments: seen.append(event) if event in FORBIDDEN else None)
found = ray_ckpt.load(url)
assert all(report.ok for report in ray_ckpt.verify(url))
ray_ckpt.checkpoints(url)
sys.stdout.write(f"{sorted(found)} {seen}")
"""


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own: audit hooks stay for ever."""
    command = [sys.executable, "-c", script, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_pickles_in_a_checkpoint_are_bytes(tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    text = pickle.dumps(Planted(bait))
    pickle.loads(text)
    bait.rmdir()
    values = {
        "text": np.array([text, b"cos\nsystem\n(S'false'\ntR."], object),
        "numbers": np.frombuffer(text.ljust(len(text) + 8, b"."), np.uint8),
    }
    store = open_store(tmp_path / "run")
    commit(store, 5, values)
    found = ray_ckpt.load(tmp_path / "run")
    assert found["text"].tolist() == values["text"].tolist()
    assert not bait.exists()
    done = run(LOAD, tmp_path / "run")
    assert done.stdout == "['numbers', 'text'] []", done.stderr
    assert not bait.exists()


def test_the_hook_would_have_seen_an_unpickling(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    commit(store, 5, {"text": np.array([pickle.dumps(Planted(tmp_path / "bait"))], object)})
    unpickle = LOAD.replace("sys.stdout", "import pickle\npickle.loads(found['text'][0])\nsys.stdout")
    done = subprocess.run(
        [sys.executable, "-c", unpickle, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "['text'] ['pickle.find_class']", done.stderr
    assert (tmp_path / "bait").is_dir()


@pytest.mark.parametrize(
    "value",
    [Planted(Path("/nowhere")), lambda: 1, np.array([Planted(Path("/nowhere"))], object), {"a": {1, 2}}],
    ids=["object", "function", "array", "set"],
)
def test_what_only_a_pickle_could_hold_is_refused_by_a_save(value: Any) -> None:
    with pytest.raises(StateError, match=r"pickle\.dumps|holds bytes or str|json\.dumps"):
        layout_of({"x": value}, 0, 1)
