"""The hooks' table: rows about what lies in the directory, for TensorFlow's hook and for ours, on a Ray cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
import tensorflow as tf
from ray.cluster_utils import Cluster

from ray_ckpt.coordinator import find, run_id
from tests.cluster import RUNS
from tests.frontends.conftest import MAKERS
from tests.frontends.sessions import (
    Do,
    Event,
    Listener,
    events,
    model,
    present,
    session,
    session_logs,
    steps,
    train,
    weights,
)
from tests.system.waiting import eventually

tf1 = tf.compat.v1
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("fresh_tf", "ray_cluster")]
Make = Callable[..., Any]


class Witness(Listener):
    """Notes what lies in the directory whenever it is told something."""

    def __init__(self, name: str, noted: list[Event], folder: str) -> None:
        super().__init__(name, noted)
        self.folder = folder
        self.seen: dict[tuple[str, int], Any] = {}

    def _note(self, what: str, session: Any, step: Any) -> None:
        super()._note(what, session, step)
        kinds = {suffix: present(self.folder, suffix) for suffix in (".index", ".meta")}
        self.seen[what, int(step)] = {
            **kinds,
            "latest": (tf.train.latest_checkpoint(self.folder) or "").rpartition("/")[2],
            "logs": [log[0] for log in session_logs(self.folder)],
            "graph": os.path.exists(os.path.join(self.folder, "graph.pbtxt")),
            "graphs": (len(events(self.folder, "graph_def")), len(events(self.folder, "meta_graph_def"))),
        }


@dataclass
class Story:
    """A job of 3 steps with a save every 2, and its second start of 2 steps."""

    folder: str
    noted: list[Event] = field(default_factory=list)
    seen: list[dict[tuple[str, int], Any]] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)

    def start(self, make: Make, runs: int) -> None:
        """One start."""
        with tf.Graph().as_default():
            made = model()
            witness = Witness("A", self.noted, self.folder)
            hook = make(self.folder, save_steps=2, listeners=[witness, Listener("B", self.noted)])
            with session(hook, folder=self.folder) as opened:
                self.restored.append(float(opened.run(made.weights)[0]))
                for _ in range(runs):
                    opened.run(made.train)
        self.seen.append(witness.seen)


@pytest.fixture(scope="module")
def stories(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Story]]:
    """The same job with each hook."""
    found = {}
    for name, make in MAKERS.items():
        found[name] = Story(str(tmp_path_factory.mktemp(name) / "run"))
        RUNS.add(run_id(found[name].folder))
        found[name].start(make, 3)
        found[name].start(make, 2)
    yield found
    tf1.summary.FileWriterCache.clear()


@pytest.fixture(params=list(MAKERS))
def story(request: pytest.FixtureRequest, stories: dict[str, Story]) -> Story:
    """The job with one of the hooks."""
    return stories[request.param]


def test_row_10_the_graph_is_written_before_the_first_save(story: Story) -> None:
    first = story.seen[0]["before", 0]
    assert first["graph"]
    assert first["graphs"] == (2, 2)
    assert first["logs"] == []


def test_row_12_the_first_save_is_at_session_creation(story: Story) -> None:
    assert [event for event in story.noted if event[0] == "A" and event[1] in ("begin", "before")] == [
        ("A", "begin"),
        *[("A", "before", step) for step in (0, 2, 3)],
        ("A", "begin"),
        *[("A", "before", step) for step in (3, 5)],
    ]
    assert story.restored == [0.0, 30.0]
    # The asynchronous hook tells of the first save when the second has been committed, too.
    assert story.seen[1]["after", 3]["latest"] in ("model.ckpt-3", "model.ckpt-5")
    assert weights(story.folder, 3) == (3, 30.0)
    assert weights(story.folder) == (5, 50.0)


def test_row_21_order_of_a_save(stories: dict[str, Story]) -> None:
    for story in (stories["tensorflow"], stories["ours"]):
        assert story.noted[2:6] == [("A", "before", 0), ("B", "before", 0), ("A", "after", 0), ("B", "after", 0)]
        before, after = story.seen[0]["before", 2], story.seen[0]["after", 2]
        assert (before[".index"], before["latest"], before["logs"]) == ([0], "model.ckpt-0", [0])
        assert (after[".index"], after["latest"], after["logs"]) == ([0, 2], "model.ckpt-2", [0, 2])


def test_row_21_of_the_asynchronous_hook(stories: dict[str, Story]) -> None:
    story = stories["async"]
    for listener in ("A", "B"):
        told = [event[1:] for event in story.noted if event[0] == listener]
        for step in (0, 2, 3, 5):
            assert told.index(("before", step)) < told.index(("after", step))
        assert [event for event in told if event[0] == "after"] == [("after", step) for step in (0, 2, 3, 3, 5)]
    for step in (0, 2, 3):
        after = story.seen[0]["after", step]
        assert step in after[".index"]
        assert step in after[".meta"]
        assert after["logs"][-1] == step


def test_row_27_files_of_a_save(story: Story) -> None:
    for suffix in (".index", ".meta", ".data-00000-of-0000"):
        found = [name for _, _, names in os.walk(story.folder) for name in names if suffix in name]
        assert {int(name.partition(".data")[0].removesuffix(suffix).rpartition("-")[2]) for name in found} == {
            *(0, 2, 3, 5)
        }
    assert steps(story.folder)[-1] == 5
    imported = import_newest(story.folder)
    assert imported == 50.0


def import_newest(folder: str) -> float:
    """The first weight, by the graph and the values of the newest checkpoint."""
    path = tf.train.latest_checkpoint(folder)
    with tf.Graph().as_default(), tf1.Session() as raw:
        saver = tf1.train.import_meta_graph(path + ".meta")
        saver.restore(raw, path)
        return float(raw.run(tf1.global_variables()[0])[0])


def test_row_27_without_graphs(make_hook: Make, folder: str) -> None:
    train(make_hook(folder, save_steps=2, save_graph_def=False), 1)
    assert present(folder) == [0, 1]
    assert present(folder, ".meta") == []
    assert "graph.pbtxt" not in os.listdir(folder)


@pytest.mark.parametrize(
    ("settings", "listed", "lying"),
    [
        ({"max_to_keep": 2}, [4, 5], [4, 5]),
        ({"max_to_keep": 0}, [5], [0, 1, 2, 3, 4, 5]),
        ({"max_to_keep": 2, "keep_checkpoint_every_n_hours": 1e-9}, [4, 5], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_row_31_keeping(
    make_hook: Make, folder: str, settings: dict[str, Any], listed: list[int], lying: list[int]
) -> None:
    made = model()
    saver = tf1.train.Saver(**settings)
    extra = {} if make_hook is MAKERS["tensorflow"] else {"delete_grace_s": 0.0}
    with session(make_hook(folder, save_steps=1, saver=saver, **extra)) as opened:
        for _ in range(5):
            opened.run(made.train)
    if settings["max_to_keep"]:
        assert steps(folder) == listed
        assert [path.rpartition("-")[2] for path in saver.last_checkpoints] == [str(step) for step in listed]
    else:
        assert steps(folder)[-1:] == listed
        assert saver.last_checkpoints == []
    for suffix in (".index", ".meta"):
        eventually(lambda suffix=suffix: present(folder, suffix) == lying, f"{suffix} of {lying} alone")


@pytest.mark.parametrize("whose", ["own", "scaffold's"])
def test_row_32_keeping_over_a_restart(make_hook: Make, folder: str, whose: str) -> None:
    extra = {} if make_hook is MAKERS["tensorflow"] else {"delete_grace_s": 0.0}
    for runs in (1, 2):
        with tf.Graph().as_default():
            made = model()
            scaffold = tf1.train.Scaffold(saver=tf1.train.Saver(max_to_keep=2))
            saver = {"saver": tf1.train.Saver(max_to_keep=2)} if whose == "own" else {"scaffold": scaffold}
            with session(make_hook(folder, save_steps=1, **saver, **extra), folder=folder, scaffold=scaffold) as opened:
                for _ in range(runs):
                    opened.run(made.train)
    # The second start saves 1 again, 2 and 3: over the first start's 1, which TensorFlow deletes with its own.
    lying = [2, 3]
    if whose == "own":
        lying = [0, 2, 3] if make_hook is MAKERS["tensorflow"] else [0, 1, 2, 3]
    eventually(lambda: present(folder) == lying, f"{lying} alone")
    assert steps(folder)[-2:] == [2, 3]


def test_row_33_a_folder_before_the_name(make_any_hook: Make, folder: str) -> None:
    made = model()
    # TensorFlow's sharded savers, as a scaffold's is by default, do not make the folder.
    saver = tf1.train.Saver()
    with session(make_any_hook(folder, save_steps=1, saver=saver, checkpoint_basename="deep/mine")) as opened:
        opened.run(made.train)
    inside = os.path.join(folder, "deep")
    assert {"graph.pbtxt", "deep"} <= set(os.listdir(folder))
    assert "checkpoint" not in os.listdir(folder)
    assert tf.train.latest_checkpoint(inside) == os.path.join(inside, "mine-1")
    assert present(inside, ".meta") == [0, 1]
    assert [log[2] for log in session_logs(folder)] == [os.path.join(inside, "mine")] * 2


def test_row_34_a_lost_session_is_restored_and_saved_again(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []

    def lose(_: Any) -> None:
        raise tf.errors.AbortedError(None, None, "lost")

    made = model()
    hook = make_any_hook(folder, save_steps=2, listeners=[Listener("A", noted)])
    with session(Do(lose, before=(6,)), hook, folder=folder) as opened:
        for _ in range(5):
            opened.run(made.train)
        hook.wait() if hasattr(hook, "wait") else None
        opened.run(made.train)
        assert hook._timer.last_triggered_step() == 4
        assert opened.run(made.weights)[0] == 50.0
        opened.run(made.train)
    assert [event[2] for event in noted if event[1] == "before"] == [0, 2, 4, 4, 6]
    assert sorted(event[2] for event in noted if event[1] == "after") == [0, 2, 4, 4, 6]
    assert weights(folder) == (6, 60.0)
    assert weights(folder, 4) == (4, 40.0)


def test_row_42_under_tf2_behaviour(stories: dict[str, Story]) -> None:
    assert tf.__internal__.tf2.enabled()
    assert weights(stories["async"].folder) == (5, 50.0)


def test_rows_38_and_39_a_third_save_waits_and_values_are_of_their_step(folder: str) -> None:
    made = model()
    hook = MAKERS["async"](folder, save_steps=1)
    runs: list[int] = []
    with session(hook, folder=folder) as opened:
        opened.run(made.train)
        hook.wait()
        logic = hook._saves.job._link.logic
        coordinator = ray.get(find(folder).pid.remote())

        def more() -> None:
            for _ in range(4):
                runs.append(int(opened.run(made.train)))

        training = threading.Thread(target=more)
        os.kill(coordinator, signal.SIGSTOP)
        try:
            training.start()
            # The saves of steps 2 and 3 are under way, and that of 4 has no memory.
            eventually(lambda: logic.step == 4, "the third due save")
            assert runs == [2, 3]
            assert 4 not in logic.snapshots
        finally:
            os.kill(coordinator, signal.SIGCONT)
        training.join()
    assert runs == [2, 3, 4, 5]
    assert [weights(folder, step) for step in range(1, 6)] == [(step, 10.0 * step) for step in range(1, 6)]
