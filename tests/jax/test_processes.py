"""JAX arrays that several processes hold, saved by some and restored by another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import open_store
from ray_ckpt.target import read_state
from tests.ports import held_port
from tests.target.saving import PREFIX

pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]
NAMES = ("rows", "columns", "grid", "partly", "half", "whole", "stage", "stage_copies")


def run(count: int, **job: Any) -> list[Any]:
    """What each of ``count`` processes printed."""
    with held_port() as port:
        return _run(count, port, job)


def _run(count: int, port: int, job: dict[str, Any]) -> list[Any]:
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("child.py")), str(port)]
    children = [
        subprocess.Popen(
            [*command, str(process), str(count), json.dumps(job)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(answer, child) for child in children]
        # Where one fails, the others wait for it.
        wait(answers, return_when=FIRST_EXCEPTION)
        for child in children:
            child.kill()
    errors = [str(done.exception()) for done in answers if done.exception()]
    assert not errors, "\n\n".join(errors)
    return [done.result() for done in answers]


def answer(child: subprocess.Popen[str]) -> Any:
    """What it printed last."""
    out, err = child.communicate(timeout=200)
    assert not child.returncode, f"exit code {child.returncode}\n{err[-3000:]}"
    return json.loads(out.splitlines()[-1])


def tensors(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, whatever pieces it is stored in."""
    stored = open_checkpoint(open_store(path), PREFIX)
    state = read_state(stored, None, rank=0, world_size=1)()
    return {name: np.asarray(state[name]).tobytes() for name in NAMES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A checkpoint of four processes, ranks and devices in disorder, and how many bytes each rank wrote."""
    path = tmp_path_factory.mktemp("saved")
    found = run(4, do="save", url=str(path), ranks=[2, 0, 3, 1], devices=[5, 0, 3, 6, 1, 7, 2, 4])
    assert all(one == found[0] for one in found)
    return path, found[0]["nbytes"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_restored_by_another_number_of_processes(saved: tuple[Path, list[int]], count: int) -> None:
    run(count, do="restore", url=str(saved[0]))


def test_restored_by_two_processes_and_by_this_one(saved: tuple[Path, list[int]]) -> None:
    run(2, do="restore", url=str(saved[0]))
    # Imports JAX, which may lack.
    from tests.jax.child import VALUES

    assert tensors(saved[0]) == {name: VALUES[name].tobytes() for name in NAMES}


@pytest.mark.slow
def test_neither_ranks_nor_device_ids_are_in_the_bytes(saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    run(4, do="save", url=str(tmp_path), ranks=[0, 1, 2, 3], devices=list(range(8)))
    assert tensors(tmp_path) == tensors(saved[0])


def test_every_process_writes_its_share_of_what_all_hold(saved: tuple[Path, list[int]]) -> None:
    """Most of the bytes are replicated, so that even shares level out what single processes hold."""
    nbytes = saved[1]
    assert max(nbytes) < 1.1 * sum(nbytes) / 4
    assert min(nbytes) > 0.9 * sum(nbytes) / 4
