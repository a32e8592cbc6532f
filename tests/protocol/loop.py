"""Training loops in lock step, run by run, on the world of `harness`."""

from __future__ import annotations

from collections.abc import Callable

from ray_ckpt.protocol.messages import JobConfig, Proposal
from tests.protocol.harness import Job, World, beat

TWO = JobConfig(world_size=2)


class Loop:
    """Ranks in lock step, whose runs are of ``length(run)`` steps each while they tell of ``told`` a run."""

    def __init__(self, config: JobConfig = TWO, *, told: int | None = 1) -> None:
        self.world = World()
        self.job = Job(self.world, config, "a").start()
        self.told = told
        self.steps = [0 for _ in self.job.workers]
        self.stops: dict[int, Proposal] = {}

    def run(self, rank: int, length: int) -> None:
        """One run of a rank, and what a hook does after it."""
        worker, host = self.job.workers[rank], self.job.hosts[rank]
        self.steps[rank] += length
        step = self.steps[rank]
        if self.told is not None and not worker.reached(step + self.told, self.told):
            return
        due = worker.arrive(step)
        if due is not None and due.snapshot is not None:
            host.seal(worker, step, due.snapshot)
        if due is not None and due.stop is not None:
            self.stops[rank] = due.stop

    def until(self, done: Callable[[], bool], lengths: Callable[[int], int], runs: int = 120) -> None:
        """All ranks run on until it is so."""
        for run in range(runs):
            if done():
                return
            for rank in range(len(self.steps)):
                self.run(rank, lengths(run))
            beat(self.world, self.job.hosts, 2)
        assert done(), f"not within {runs} runs: {self.world.coordinator.cut.proposals}"

    def serve(self, request: str, lengths: Callable[[int], int]) -> None:
        """A request is committed while the loop goes on."""
        worker = self.job.workers[0]
        worker.request(request, "wanted")
        self.until(lambda: request in worker.request_outcomes, lengths)
        assert worker.request_outcomes[request].state == "committed"
