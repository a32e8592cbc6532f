"""A host or process that is about to go: one save of all at one step, committed in time, and all stop."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

import ray_ckpt
from ray_ckpt.agent.notices import HOST_VARIABLE
from ray_ckpt.checkpointer import sigterm
from ray_ckpt.coordinator import run_id
from tests.agent.metadata_server import MetadataServer, running
from tests.cluster import ROOT, RUNS
from tests.system import states
from tests.system.draining import NOTICE_S, drain
from tests.system.job import Crew, Job, get
from tests.system.waiting import eventually

LONG = 100_000


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    """Compute Engine's metadata server, as processes see it that are started from now on: those of a new host."""
    with running() as server:
        monkeypatch.setenv(HOST_VARIABLE, server.host)
        yield server


@pytest.fixture
def leaving(ray_cluster: Cluster) -> Iterator[str]:
    """The id of one more host, which a test may drain."""
    before = {node["NodeID"] for node in ray.nodes()}
    added = ray_cluster.add_node(num_cpus=4, object_store_memory=80_000_000)
    try:
        (node,) = {node["NodeID"] for node in ray.nodes()} - before
        yield node
    finally:
        ray_cluster.remove_node(added)


def training(crew: Crew, node: str, folder: Path) -> tuple[Job, list[Any]]:
    """Two ranks that have made some steps, the second one on this host; and their loops, which end when told to."""
    job = Job(Crew([crew.hosts[0], node]), folder / "run").start(2)
    RUNS.add(run_id(job.url))
    job.all("restore")
    loops = job.begin("train", 1, LONG, states.small, 0.01)
    eventually(lambda: job.on(0, "get", "done") > 5, "some steps")
    return job, loops


@pytest.mark.xdist_group("ray")
def test_a_drained_host_has_all_save_and_stop_before_it_goes(crew: Crew, leaving: str, tmp_path: Path) -> None:
    job, loops = training(crew, leaving, tmp_path)
    assert not job.on(0, "get", "preempted")
    drain(leaving, NOTICE_S)
    stopped = get(loops)
    assert stopped[0] == stopped[1] != []
    assert job.all("get", "preempted") == [True, True]
    reason = job.on(0, "get", "stop_reason")
    assert reason.startswith("the host of rank 1, ")
    assert "is being drained by Ray and ends at" in reason
    job.all("call", "close")
    assert job.steps() == stopped[0]
    job.end()
    again = Job(Crew(crew.hosts[:2]), job.path).start(2)
    assert again.all("restore") == [stopped[0][0]] * 2
    again.end()


@pytest.mark.xdist_group("ray")
def test_a_preemption_notice_does_as_a_drain(
    crew: Crew, metadata: MetadataServer, leaving: str, tmp_path: Path
) -> None:
    job, loops = training(crew, leaving, tmp_path)
    metadata.keys["preempted"] = "TRUE"
    stopped = get(loops)
    assert stopped[0] == stopped[1] != []
    assert job.all("get", "preempted") == [True, True]
    job.all("call", "close")
    assert job.steps() == stopped[0]
    job.end()


@pytest.fixture
def started(ray_cluster: Cluster) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The id of one more host, and the `ray start --block` that a container or machine ends with SIGTERM."""
    before = {node["NodeID"] for node in ray.nodes()}
    command = [str(Path(sys.executable).with_name("ray")), "start", f"--address={ray_cluster.address}", "--block"]
    size = ["--num-cpus=4", "--object-store-memory=80000000", "--disable-usage-stats"]
    settings = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE_S)}
    process = subprocess.Popen([*command, *size], env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        (node,) = eventually(lambda: {n["NodeID"] for n in ray.nodes() if n["Alive"]} - before, "one more host")
        yield node, process
    finally:
        ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for child in [*ours, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_sigterm_to_ray_start_does_as_a_drain(
    crew: Crew, started: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    node, process = started
    job, loops = training(crew, node, tmp_path)
    process.send_signal(signal.SIGTERM)
    stopped = get(loops)
    assert stopped[0] == stopped[1] != []
    assert job.all("get", "preempted") == [True, True]
    job.all("call", "close")
    assert job.steps() == stopped[0]
    job.end()


@pytest.mark.xdist_group("ray")
def test_sigterm_to_one_process_stops_all_at_one_step(ray_cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    RUNS.add(run_id(str(run)))
    command = [sys.executable, "-m", "tests.system.driver", ray_cluster.address, str(run)]
    ranks = [
        subprocess.Popen([*command, str(rank), "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None
            # Ray may say something of its own before.
            assert "training\n" in iter(process.stdout.readline, "")
        ranks[1].send_signal(signal.SIGTERM)
        ends = [json.loads(process.communicate(timeout=120)[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert ends[0] == ends[1]
    assert ends[0]["preempted"]
    assert ends[0]["reason"] == "rank 1 was sent SIGTERM"
    assert [process.returncode for process in ranks] == [0, 0]
    assert [c.step for c in ray_ckpt.checkpoints(run)] == [ends[0]["step"]]


@pytest.fixture
def terminated() -> Iterator[list[str]]:
    """What SIGTERM does where nobody has asked for anything is noted here instead of ending this process."""
    notes: list[str] = []
    former = signal.getsignal(signal.SIGTERM)

    def of_ray(*_: Any) -> None:
        notes.append("ended")

    of_ray.__module__ = "ray._private.worker"
    signal.signal(signal.SIGTERM, of_ray)
    yield notes
    signal.signal(signal.SIGTERM, former)


class Listener:
    """Notes that it was told."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def on_sigterm(self) -> None:
        self.told.set()


@pytest.fixture
def listener(terminated: list[str]) -> Iterator[Listener]:
    """One that listens."""
    found = Listener()
    sigterm.listen(found)
    yield found
    sigterm.unlisten(found)


def terminate() -> None:
    """Send this process SIGTERM, and let Python handle it."""
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_sigterm_does_what_it_did_before(listener: Listener, terminated: list[str]) -> None:
    terminate()
    assert listener.told.wait(60.0)
    assert not terminated
    terminate()
    assert terminated == ["ended"]


def test_all_that_listen_are_told(listener: Listener, terminated: list[str]) -> None:
    second, third = Listener(), Listener()
    sigterm.listen(second)
    sigterm.listen(third)
    sigterm.unlisten(listener)
    del third
    terminate()
    assert second.told.wait(60.0)
    assert not listener.told.is_set()
    assert not terminated


def test_with_nobody_left_sigterm_does_what_it_did_before(listener: Listener, terminated: list[str]) -> None:
    sigterm.unlisten(listener)
    terminate()
    assert terminated == ["ended"]
    assert not listener.told.is_set()


def test_one_that_was_never_closed_does_not_keep_the_process(terminated: list[str]) -> None:
    sigterm.listen(Listener())
    gc.collect()
    terminate()
    assert terminated == ["ended"]


def test_a_forked_process_ends(listener: Listener) -> None:
    # As multiprocessing ends its workers.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        child = pool.apply(os.getpid)
        assert pool.apply(signal.getsignal, (signal.SIGTERM,)) is sigterm._handle
    assert not psutil.pid_exists(child)
    assert not listener.told.is_set()


def test_a_handler_of_the_program_stays(terminated: list[str]) -> None:
    own: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: own.append(number))
    found = Listener()
    sigterm.listen(found)
    terminate()
    assert own == [signal.SIGTERM]
    assert not found.told.is_set()


def test_another_thread_sets_no_handler(terminated: list[str]) -> None:
    found = Listener()
    thread = threading.Thread(target=sigterm.listen, args=(found,))
    thread.start()
    thread.join()
    terminate()
    assert terminated == ["ended"]


def test_jax_keeps_its_own_handler(terminated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    found = Listener()
    sigterm.listen(found)
    terminate()
    assert terminated == ["ended"]
