"""Simulated hosts for `benchmarks.scale`: the real machines of agents and workers, one worker a host, without I/O."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_ckpt import Slice
from ray_ckpt.bundle import encode_piece, encode_run, nbytes_of, piece_key, shard_name
from ray_ckpt.leaves.layout import fingerprint, layout_of
from ray_ckpt.protocol.host import Free, HostLogic, Keep, StartWrite
from ray_ckpt.protocol.messages import HostView, JobConfig, RestoreResult, RestoreWish, SegmentInfo
from ray_ckpt.protocol.worker import WorkerLogic
from ray_ckpt.types import Box, Layout, LeafSpec, ShardReport

ROWS = 16
SAVE_STEPS = 10**6
"""Far away: the driver jumps there when a save shall begin."""

SEALS_S = 0.3
WRITES_S = (1.0, 2.0)
"""How long the hosts take to copy and to write: spread evenly, as by a store that serves all alike."""

SLICED_OVER = 4096
"""Hosts that share one sliced tensor: as many as TensorFlow reads well."""


def layouts(hosts: int, entries: int) -> list[Layout]:
    """Per host: half of its leaves are arrays of its own, half are its rows of arrays that many hosts share."""
    each = entries // hosts
    shared, own = each // 2, each - each // 2
    over = min(hosts, SLICED_OVER)
    state = {"own": {f"h00000.{i:05d}": np.zeros((ROWS, ROWS), np.float32) for i in range(own)}}
    rows = np.zeros((ROWS, ROWS), np.float32)
    state["shared"] = {
        f"c00000.{i:05d}": Slice(rows, offset=(0, 0), global_shape=(ROWS * over, ROWS)) for i in range(shared)
    }  # type: ignore[assignment]
    model = layout_of(state, 0, hosts)[0]
    return [_layout(model, rank, hosts) for rank in range(hosts)]


def _layout(model: Layout, rank: int, hosts: int) -> Layout:
    """The model's leaves under this rank's names and with its rows."""
    club, place = divmod(rank, SLICED_OVER)
    size = min(hosts - club * SLICED_OVER, SLICED_OVER)

    def renamed(text: str) -> str:
        return text.replace("h00000.", f"h{rank:05d}.").replace("c00000.", f"c{club:05d}.")

    leaves = []
    for leaf in model.leaves:
        sliced = "c00000." in leaf.name
        shape = (ROWS * size, ROWS) if sliced else leaf.shape
        box = Box((ROWS * place if sliced else 0, 0), (ROWS, ROWS))
        leaves.append(LeafSpec(renamed(leaf.name), leaf.dtype, shape, (box,), leaf.kind))
    tree = renamed(model.tree)
    return Layout(tuple(leaves), tree, fingerprint(tuple(leaves), tree))


@dataclass(frozen=True, slots=True)
class Wire:
    """What a host needs of the world: ``send(host, report, seen, wait_s)`` and ``later(seconds, function)``."""

    send: Callable[[SimulatedHost, Any, tuple[int, int], float], None]
    later: Callable[[float, Callable[[], None]], Any]
    rng: random.Random


class SimulatedHost:
    """One host with one worker. It says what a real agent says, when a real one would."""

    def __init__(self, rank: int, config: JobConfig, layout: Layout, wire: Wire) -> None:
        self.rank = rank
        self.layout = layout
        self.logic = HostLogic(f"node-{rank:05d}" + "0" * 46, f"{1:020d}", name=f"host{rank}")
        self.worker = WorkerLogic(f"worker{rank:010d}", rank, config)
        self.wire = wire
        self.open = 0
        self.reports: list[ShardReport] = []
        self.written: Callable[[SimulatedHost], None] = lambda _: None
        self._segments: dict[str, SegmentInfo] = {}
        self._read = False
        self._sealing = False
        self._runs: dict[tuple[int, int], bytes] = {}
        self.worker.wish(RestoreWish("newest"))

    def join(self) -> None:
        """The process is there and asks for the newest checkpoint."""
        self._tell()

    def arrive(self, step: int) -> None:
        """The training loop has completed a step; while it takes a snapshot, it completes none."""
        if step > self.worker.step and not self._sealing:
            due = self.worker.arrive(step)
            if due is not None and due.snapshot is not None:
                self._sealing = True
                self.wire.later(self.wire.rng.uniform(0, SEALS_S), lambda: self._seal(step))

    def beat(self) -> None:
        """The worker's own poll of its agent has ended: its report is new, and so is what the agent knows."""
        self.logic.on_worker(self.worker.report())

    def _tell(self) -> None:
        self.beat()
        self.logic.on_segments(self._segments.values())
        self._act()
        self.ask()

    def ask(self) -> None:
        """Report, and leave the question for news open."""
        view = self.logic.view
        self.open += 1
        seen = (view.epoch, view.version) if view else (0, -1)
        self.wire.send(self, self.logic.report(), seen, view.poll_s if view else 1.0)

    def on_answer(self, view: HostView | None) -> None:
        """The coordinator's answer to the oldest open question."""
        self.open -= 1
        if view is not None:
            self.logic.on_view(view)
            self._act()
            answer = self.logic.worker_view(self.worker.worker)
            if answer is not None:
                self.worker.on_view(*answer)
                self._react()
        if self.open == 0:
            self.beat()
            self.ask()

    def _react(self) -> None:
        worker = self.worker
        if worker.restore is not None and not self._read:
            self._read = True
            worker.restore_read(RestoreResult(*worker.restore.key))
            self._tell()
            self.wire.later(0.1, self._register)

    def _register(self) -> None:
        self.worker.set_layout(self.layout)
        self._tell()

    def _act(self) -> None:
        for action in self.logic.take():
            if isinstance(action, Free):
                self._segments.pop(action.segment.name, None)
                self.logic.on_freed(action.segment.name)
            elif isinstance(action, Keep):
                self._segments[action.segment.name] = replace(action.segment, kept=True)
            elif isinstance(action, StartWrite):
                self.wire.later(self.wire.rng.uniform(*WRITES_S), lambda start=action: self._wrote(start))  # type: ignore[misc]

    def _seal(self, step: int) -> None:
        plan, worker = self.worker.plan, self.worker
        assert plan is not None
        assert worker.generation is not None
        name = f"{self.rank:05d}-{step // SAVE_STEPS % 2}.segment"
        self._segments[name] = SegmentInfo(
            rank=self.rank,
            generation=worker.generation,
            step=step,
            world_size=worker.config.world_size,
            plan_id=plan.plan_id,
            trigger="cadence",
            writers=len(plan.writers),
            writer_base=plan.writer_base,
            num_writers=plan.num_writers,
            fingerprint=self.layout.fingerprint,
            name=name,
            fills=step,
            directory=worker.directory,
        )
        worker.snapshotted(step, "cadence")
        self._sealing = False
        self._tell()

    def _wrote(self, start: StartWrite) -> None:
        order = start.order
        run, nbytes = self._run(start)
        path = shard_name(order.prefix, start.writer, order.num_shards)
        report = ShardReport(
            order.attempt, start.writer, 0, start.writer, path, nbytes, run, b"", 1.0, self.logic.name, 1.0
        )
        self.logic.on_written(start, report)
        self.written(self)
        self._act()
        self.ask()

    def _run(self, start: StartWrite) -> tuple[bytes, int]:
        """The index entries of one writer, as the writers encode them; equal from save to save."""
        plan = self.worker.plan
        assert plan is not None
        share = plan.writers[start.local]
        pairs, offset = [], 0
        for copy in plan.copies[share.first : share.stop]:
            leaf = self.layout.leaves[copy.leaf]
            nbytes = nbytes_of(leaf.dtype, copy.box.size) or 0
            value = encode_piece(leaf.dtype, copy.box.shape, start.writer, offset, nbytes, 1)
            pairs.append((piece_key(leaf.name, copy.box, leaf.shape), value))
            offset += nbytes
        key = (start.local, plan.num_writers)
        if key not in self._runs:
            self._runs[key] = encode_run(sorted(pairs))
        return self._runs[key], offset
