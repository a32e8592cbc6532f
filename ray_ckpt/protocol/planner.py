"""Who writes what: one plan for one set of layouts, made anew when all ranks change their structure together."""

from __future__ import annotations

from collections.abc import Callable

from ray_ckpt.errors import SaveError, StateError
from ray_ckpt.plan import make_plan
from ray_ckpt.protocol.messages import Problem, SegmentInfo, WorkerReport
from ray_ckpt.types import IN_PART, Layout, Plan

_SHOWN = 8
"""How many ranks an error names."""

_PLANS_KEPT = 4
"""Saves under way may still need the plan before the present one."""


class Planner:
    """Keeps the layouts that have arrived, and the present plan."""

    def __init__(self) -> None:
        self.layouts: dict[str, Layout] = {}
        self.plan: Plan | None = None
        self.fingerprints: tuple[str, ...] = ()
        self.error: Problem | None = None
        self._plans: dict[tuple[str, ...], Plan] = {}

    def reset(self) -> None:
        """A new generation starts with a new plan; layouts are kept, most likely they come again."""
        self.plan = None
        self.fingerprints = ()
        self.error = None

    def update(
        self,
        world_size: int,
        reports: dict[int, WorkerReport],
        sealed: Callable[[int, int], bool],
    ) -> None:
        """Plan as soon as all layouts are there, and again once all ranks stand at a change.

        ``sealed(rank, step)`` says whether a rank's snapshot of that step is there already.
        """
        if len(reports) < world_size:
            return
        wanted = tuple(reports[rank].fingerprint or "" for rank in range(world_size))
        if wanted == self.fingerprints or any(f not in self.layouts for f in wanted):
            return
        if self.plan is not None and not self._all_there(reports, sealed):
            return
        self.fingerprints = wanted
        try:
            self.plan = self._make(wanted)
            self.error = None
        except StateError as error:
            self.plan = None
            self.error = Problem("StateError", str(error))

    def plan_of(self, segments: dict[int, SegmentInfo]) -> tuple[Plan, list[Layout]]:
        """The plan that these snapshots, one of each rank, were taken by, and the layouts by rank.

        Raises:
            SaveError: another version of the package divided them; names the step and the ranks.
        """
        fingerprints = tuple(segments[rank].fingerprint for rank in range(len(segments)))
        plan = self._make(fingerprints)
        others = sorted(rank for rank, segment in segments.items() if segment.plan_id != plan.plan_id)
        if others:
            ranks = f"{', '.join(map(str, others[:_SHOWN]))}{', ...' if len(others) > _SHOWN else ''}"
            raise SaveError(
                f"step {segments[others[0]].step}: the snapshot was divided by another version of ray_ckpt (ranks"
                f" {ranks}), so what each rank wrote is not known here; the next save is not"
            )
        return plan, [self.layouts[f] for f in fingerprints]

    def _make(self, fingerprints: tuple[str, ...]) -> Plan:
        plan = self._plans.get(fingerprints)
        if plan is None:
            plan = self._plans[fingerprints] = make_plan([self.layouts[f] for f in fingerprints])
            for old in list(self._plans)[:-_PLANS_KEPT]:
                del self._plans[old]
        return plan

    def _all_there(self, reports: dict[int, WorkerReport], sealed: Callable[[int, int], bool]) -> bool:
        """Whether every rank has come to the step at which some wait for a new plan.

        A rank that has just arrived there may be about to register a new layout as well; one that waits although the
        present plan is for its layout is about to hear of it, and may then change once more.
        """
        asking = {
            rank: r.waiting_step
            for rank, r in reports.items()
            if r.waiting_step is not None and r.fingerprint != self.fingerprints[rank]
        }
        if not asking:
            return False
        step = max(asking.values())
        return all(rank in asking or r.step > step or sealed(rank, step) for rank, r in reports.items())


def replica_mismatch(segments: dict[int, SegmentInfo]) -> str | None:
    """What differs between arrays that several ranks hold under one name, None if nothing was seen to differ.

    A plain array of one name on several ranks is presumed to be a replica, and only one rank's is written. Ranks that
    took part in unequally many saves may digest unequally much: only equal parts are compared.
    """
    seen: dict[str, tuple[int, int]] = {}
    for rank, segment in sorted(segments.items()):
        for name, digest in segment.digests:
            other_rank, other = seen.setdefault(name, (rank, digest))
            if other != digest:
                return (
                    f"'{name.removesuffix(IN_PART)}' has different values on rank {other_rank} and rank {rank}, but an "
                    "array of one name on several ranks is saved once: make them equal, give them different names, "
                    "mark parts of one array with ray_ckpt.Slice, or keep one for each worker with ray_ckpt.PerWorker"
                )
    return None
