"""The processes of `tests.system.trainer`, as a test sees them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.system.lan import Host, Lan
from tests.system.trainer import Order
from tests.system.waiting import eventually
from tests.system.witness import Witness

KEPT = 3
LONG_S = 240.0
"""What takes seconds on a machine that does nothing else."""
_AHEAD = 100


class Trainer:
    """A trainer's process, seen from the test."""

    def __init__(self, host: Host, order: Order) -> None:
        self.host = host
        self.order = order
        text = json.dumps(dataclasses.asdict(order))
        self.log = Path(f"{order.told}.log")
        self.process: subprocess.Popen[bytes] = host.run(
            sys.executable, "-m", "tests.system.trainer", text, log=str(self.log)
        )

    def told(self, key: str) -> list[Any]:
        """All that it has said under this key."""
        path = Path(self.order.told)
        lines = path.read_text().splitlines() if path.exists() else []
        return [found[key] for found in map(json.loads, lines) if key in found]

    def until(self, key: str, timeout_s: float = LONG_S) -> Any:
        """The first that it says under this key."""

        def said() -> list[Any]:
            assert self.told(key) or self.process.poll() is None, self.log.read_text()
            return self.told(key)

        return eventually(said, f"{key} of {self.order.told}", timeout_s)[0]

    def until_step(self, more: int, timeout_s: float = LONG_S) -> int:
        """Wait until it has trained so many more steps; the last one."""
        self.until("step", timeout_s)
        target = self.told("step")[-1] + more
        eventually(lambda: self.told("step")[-1] >= target, f"step {target} of {self.order.told}", timeout_s)
        return int(self.told("step")[-1])

    def until_ended(self, timeout_s: float = LONG_S) -> int:
        """Its process's exit status."""
        eventually(lambda: self.process.poll() is not None, f"the end of {self.order.told}", timeout_s)
        return int(self.process.returncode)

    def kill(self) -> None:
        """SIGKILL it, unless it has ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Job:
    """The trainers of a test: a run in a folder of its own, on hosts of one cluster. They end with a ``with``."""

    def __init__(self, lan: Lan, head: Host, name: str) -> None:
        self.folder = lan.folder / name
        self.folder.mkdir()
        self.run = self.folder / "run"
        self._head = head
        self._trainers: list[Trainer] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for trainer in self._trainers:
            trainer.kill()

    def start(self, host: Host, by: str, rank: int = 0, world: int = 1, **more: Any) -> Trainer:
        """A process of the start ``by``; ``more``: other fields of its `Order`."""
        order = Order(
            head=self._head.address,
            address=host.address,
            url=str(self.run),
            memory=str(host.memory),
            told=str(self.folder / f"{by}-{rank}"),
            stop=str(self.folder / f"stop-{by}"),
            rank=rank,
            world=world,
            by=by,
            **{"settings": {"save_steps": 20, "max_to_keep": KEPT}, **more},
        )
        self._trainers.append(Trainer(host, order))
        return self._trainers[-1]


def stop(*trainers: Trainer) -> None:
    """Have the ranks of a start end well, at a step that none has reached."""
    for trainer in trainers:
        trainer.until("step")
    last = max(trainer.told("step")[-1] for trainer in trainers) + _AHEAD
    path = Path(trainers[0].order.stop)
    part = path.with_suffix(".part")
    part.write_text(str(last))
    part.rename(path)
    for trainer in trainers:
        assert trainer.until_ended() == 0, trainer.log.read_text()


def until_more_commits(witness: Witness, generation: int, number: int) -> list[int]:
    """Wait until a start has committed so many more steps; all of them."""
    target = len(witness.committed(generation)) + number
    what = f"{target} commits of generation {generation}"
    eventually(lambda: len(witness.committed(generation)) >= target, what, LONG_S)
    return witness.committed(generation)
