"""Four workers on four hosts save together; any number of workers, and plain TensorFlow, read it back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_ckpt
from tests.system import states
from tests.system.job import Job

pytestmark = pytest.mark.xdist_group("ray")

READ_BY_TENSORFLOW = """
import sys, numpy as np, tensorflow as tf
path = tf.train.latest_checkpoint(sys.argv[1])
reader = tf.train.load_checkpoint(path)
names = [n for n in reader.get_variable_to_shape_map() if n != "_ray_ckpt"]
print(path)
np.savez(sys.argv[2], **{n.replace("/", "|"): np.asarray(reader.get_tensor(n)) for n in names if reader.
    get_variable_to_dtype_map()[n] not in (tf.string, tf.bfloat16)})
"""


def saved(job: Job, world: int, step: int = 4) -> Job:
    """A run that has saved one step of `states.mixed`."""
    job.start(world)
    assert job.all("restore", states.mixed) == [None] * world
    job.all("train", 1, step, states.mixed)
    job.all("call", "close")
    assert job.steps() == [step]
    return job


def test_four_hosts_save_and_any_number_restores(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = saved(make_job(), 4)
    expected = states.whole(4)
    loaded = ray_ckpt.load(job.url)
    assert states.plain({n: loaded[n] for n in expected}) == states.plain(expected)
    assert (loaded["step"], loaded["name"]) == (4, b"after 4")
    writers = {line.split("-")[2] for line in job.files("*.data-*")}
    assert len(writers) >= 5, "four hosts write their own shards, the coordinator one"
    for world, axis in ((3, 0), (1, 0), (4, 1)):
        again = make_job().start(world)
        make = partial(states.mixed, axis=axis)
        assert again.all("restore", make) == [4] * world
        for rank, state in enumerate(again.all("get", "state")):
            wanted = make(rank, world, 4)
            if world != 4:
                wanted["rng"] = states.mixed(0, world, 4)["rng"]
            assert state == states.plain(wanted), f"rank {rank} of {world}"
        again.end()


@pytest.mark.slow
def test_tensorflow_reads_what_four_hosts_saved(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = saved(make_job(), 4)
    out = tmp_path / "out.npz"
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_TENSORFLOW, job.url, str(out)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{job.url}/model.ckpt-4"
    with np.load(out) as found:
        loaded: dict[str, Any] = ray_ckpt.load(job.url)
        assert {"table", "step", "rate"} <= {n.replace("|", "/") for n in found}
        for name in found:
            assert states.plain(found[name]) == states.plain(loaded[name.replace("|", "/")])
        np.testing.assert_array_equal(found["table"], states.whole(4)["table"])


@pytest.mark.slow
def test_one_worker_saves_and_four_restore(make_job: Callable[..., Job]) -> None:
    saved(make_job(), 1).end()
    again = make_job().start(4)
    assert again.all("restore", partial(states.mixed, axis=1)) == [4] * 4
    for rank, state in enumerate(again.all("get", "state")):
        mine = states.mixed(rank, 4, 4, axis=1)
        assert state["table"] == states.plain(mine["table"])
        assert state["rng"] == states.plain(states.mixed(0, 4, 4)["rng"]), "rank 0's value goes to all"
