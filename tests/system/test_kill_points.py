"""Coordinator, agents and writers are killed at each of their actions, before it and after it.

Whatever it is: the loops go on, the save is finished or abandoned, what was committed stays and is sound, the directory
never shows less than before, and the next saves commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.coordinator.executor import _ACTIONS
from ray_ckpt.errors import SaveError
from ray_ckpt.protocol.host import Action, StartWrite
from tests.cluster import RUNS
from tests.system import kill_hook, states
from tests.system.job import QUICK, Crew, Job, get
from tests.system.processes import segment_folder
from tests.system.test_failures import break_shards
from tests.system.waiting import eventually
from tests.system.worker import Worker

pytestmark = pytest.mark.xdist_group("ray")

WHEN = ("before", "after")

AT_START = ("ReadHead", "ReadForeign", "ListAgents", "Append:claim", "Append:seal", "ListClaims")
"""What a coordinator does before it has anything to save."""

IN_A_SAVE = ("PutClaim", "HasIndex", "PutMetadata", "PutIndex", "Append:commit", "RepairState", "Committed")
IN_RETENTION = ("Append:delete", "ListPins", "ReadState", "DeleteIndex", "DeleteData", "DeleteClaim", "PruneLog")
IN_A_FAILURE = ("Append:abort",)
OF_AGENTS = ("prepare", "keep layout", "next try", "start write", "written", "free", "view")
OF_MEMORY = (
    *(("keep", when) for when in WHEN),
    *(("mirror", when) for when in WHEN),
    ("peer mirrors", "before"),
    ("peer pulls", "after"),
    ("peer sums", "before"),
    ("peer sums", "after"),
)
"""Of the memory tiers: what a host does with its own snapshots, and what its peer does that copies one (which is sealed
before it is summed up).
"""
SLOTS = 2
COPIES = 2

OF_WRITERS = (("shard", "before"), ("block", "after"), ("shard", "after"))

BIG = partial(states.large, nbytes=24 << 20)


@dataclass
class _Crew(Crew):
    """Workers whose processes, and those that they start, can be struck."""

    folder: Path = field(default_factory=Path)

    def hire(self, host: str) -> Any:
        rested = self.idle.setdefault(host, [])
        if rested:
            return rested.pop()
        where = NodeAffinitySchedulingStrategy(host, soft=False)
        environment = kill_hook.environment(self.folder)
        options = {"num_cpus": 0, "max_concurrency": 8, "scheduling_strategy": where, "runtime_env": environment}
        return ray.remote(Worker).options(**options).remote()


@pytest.fixture(scope="module")
def struck_crew(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> _Crew:
    hosts = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return _Crew(hosts[:2], folder=tmp_path_factory.mktemp("kill_points"))


@dataclass
class _Struck:
    """A job, and the point at which one of its processes is to be killed."""

    job: Job
    folder: Path
    who: str
    action: str
    when: str
    armed: Path = field(default_factory=Path)

    def arm(self) -> None:
        self.armed = kill_hook.arm(self.folder, self.job.url, self.who, self.action, self.when)

    def until_killed(self) -> None:
        """It was that action, in that process."""
        eventually(lambda: not self.armed.exists(), f"{self.who} killed {self.when} {self.action}")


@pytest.fixture
def strike(struck_crew: _Crew, tmp_path: Path) -> Any:
    """``strike(who, action, when)``: a job of two workers that has not started yet."""
    made: list[Job] = []

    def make(who: str, action: str, when: str, **settings: Any) -> _Struck:
        settings = {"save_steps": 2, "max_to_keep": 1, "timeouts": QUICK, **settings}
        made.append(Job(struck_crew, tmp_path / "run", settings))
        RUNS.add(run_id(made[-1].url))
        return _Struck(made[-1], struck_crew.folder, who, action, when)

    yield make
    for job in made:
        job.end()


def goes_on(struck: _Struck, first: int, *, make: Any = states.small, last: int = 0) -> None:
    """Loops and saves go on to the ``last`` step; what is listed is sound; nothing that was committed is missed."""
    job = struck.job
    last = last or first + 3
    newest = max(job.steps(), default=0)
    running = job.begin("train", first, last, make)
    struck.until_killed()
    get(running)
    # A snapshot outlives the process that takes care of it: its save is finished by the next one.
    job.all("call", "wait")
    assert max(job.steps(), default=0) >= newest
    job.all("train", last + 1, last + 2, make)
    job.all("call", "wait")
    job.until_committed(last + 2)
    reports = ray_ckpt.verify(job.url)
    assert all(report.ok for report in reports), reports
    assert job.steps()[-1] == last + 2
    expected = make(1, 2, last + 2)
    assert ray_ckpt.load(job.url)["step"] == expected["step"]


def started(struck: _Struck, make: Any = states.small) -> _Struck:
    """The job has committed step 2."""
    struck.job.start(2)
    assert struck.job.all("restore", make) == [None, None]
    struck.job.all("train", 1, 2, make)
    struck.job.until_committed(2)
    return struck


def until_copied(job: Job, step: int) -> None:
    """Each part of this step lies on two hosts, and none holds more than it ever has room for."""
    eventually(lambda: get(job.coordinator().status.remote()).replicated_step == step, f"copies of step {step}")
    for rank in range(len(job.workers)):
        found = [path.name for path in segment_folder(job, rank).glob("*.segment")]
        assert len(found) <= SLOTS + COPIES, found


def all_given_back(job: Job) -> None:
    """A clean end leaves no segment on any host."""
    folders = [segment_folder(job, rank) for rank in range(len(job.workers))]
    job.all("call", "close")
    eventually(lambda: not [p for folder in folders for p in folder.glob("*.segment")], "empty folders")


def dies_with_copies(strike: Callable[..., _Struck], action: str, when: str) -> _Struck:
    struck = started(strike("agent", action, when, replicas=1, snapshots=SLOTS))
    until_copied(struck.job, 2)
    struck.arm()
    goes_on(struck, 3)
    until_copied(struck.job, struck.job.steps()[-1])
    return struck


def test_every_action_of_the_coordinator_has_a_case() -> None:
    cases = {name.partition(":")[0] for name in (*AT_START, *IN_A_SAVE, *IN_RETENTION, *IN_A_FAILURE)}
    assert cases == {io.__name__ for io in _ACTIONS}


def test_every_action_of_a_host_has_a_case() -> None:
    cases = {*OF_AGENTS, *(action for action, _ in OF_MEMORY)}
    assert {"start write" if io is StartWrite else io.__name__.lower() for io in get_args(Action)} <= cases


def test_the_coordinator_dies_with_the_commit_made_and_untold(strike: Callable[..., _Struck]) -> None:
    struck = started(strike("coordinator", "Append:commit", "after"))
    struck.arm()
    goes_on(struck, 3)


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("action", AT_START)
def test_the_coordinator_dies_at_its_start(strike: Callable[..., _Struck], action: str, when: str) -> None:
    struck = strike("coordinator", action, when)
    struck.arm()
    struck.job.start(2)
    assert struck.job.all("restore") == [None, None]
    goes_on(struck, 1)


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("action", [*IN_A_SAVE, *IN_RETENTION])
def test_the_coordinator_dies_in_a_save_or_at_cleaning_up(
    strike: Callable[..., _Struck], action: str, when: str
) -> None:
    struck = started(strike("coordinator", action, when))
    struck.arm()
    goes_on(struck, 3, last=40 if action == "PruneLog" else 6)


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("action", IN_A_FAILURE)
def test_the_coordinator_dies_while_it_gives_a_save_up(strike: Callable[..., _Struck], action: str, when: str) -> None:
    struck = started(strike("coordinator", action, when))
    break_shards(struck.job.path, 4)
    struck.arm()
    struck.job.all("train", 3, 4)
    struck.until_killed()
    for waiting in struck.job.begin("call", "wait"):
        # Given up; or, as the next coordinator has it written again under another name, finished after all.
        with contextlib.suppress(SaveError):
            get(waiting)
    goes_on(struck, 5, last=6)


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("action", OF_AGENTS)
def test_an_agent_dies(strike: Callable[..., _Struck], action: str, when: str) -> None:
    # Of two slots both hold what a restart may need: they are overwritten, not freed.
    struck = strike("agent", action, when, snapshots=3 if action == "free" else 2)
    if action in ("prepare", "keep layout"):
        struck.arm()
        struck.job.start(2)
        assert struck.job.all("restore") == [None, None]
        goes_on(struck, 1)
    else:
        started(struck)
        struck.arm()
        goes_on(struck, 3)


def test_the_peer_dies_with_its_copy_sealed_and_untold(strike: Callable[..., _Struck]) -> None:
    dies_with_copies(strike, "peer mirrors", "after")


@pytest.mark.slow
@pytest.mark.parametrize(("action", "when"), OF_MEMORY)
def test_an_agent_dies_that_keeps_or_copies_a_snapshot(strike: Callable[..., _Struck], action: str, when: str) -> None:
    all_given_back(dies_with_copies(strike, action, when).job)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "when"), OF_WRITERS)
def test_a_writer_dies(strike: Callable[..., _Struck], action: str, when: str) -> None:
    struck = started(strike("writer", action, when), BIG)
    struck.arm()
    goes_on(struck, 3, make=BIG)
