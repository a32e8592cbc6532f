"""Executes the coordinator's I/O against a Store: one blocking function for each action of `protocol.flows`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_ckpt import log
from ray_ckpt.bundle import graph_name, index_name, parse_shard_name, parse_state_file
from ray_ckpt.coordinator.assemble import Entries, merged_index, metadata_shard, partitioned_entries
from ray_ckpt.errors import DamagedError, ObjectMissingError, RayCkptError
from ray_ckpt.protocol import flows
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.storage import Store
from ray_ckpt.timeline import timeline_path
from ray_ckpt.types import Layout, Plan, ShardReport

PlanOf = Callable[[SaveState], tuple[Plan, Sequence[Layout]]]


class Executor:
    """``plan_of`` gives the plan of a save and the layouts by rank that it was made from; ``agents`` the hosts where
    the run has one, and their names.
    """

    def __init__(
        self,
        store: Store,
        plan_of: PlanOf,
        clock: Callable[[], float] = time.time,
        agents: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._store = store
        self._plan_of = plan_of
        self._clock = clock
        self._agents = agents
        self._partitioned: tuple[str, Entries] = ("", [])

    def run(self, io: flows.Io) -> Any:
        """The result of one action; an `IoFailedError` is returned, not raised, since it is an answer as well."""
        try:
            return _ACTIONS[type(io)](self, io)
        except RayCkptError as error:
            return flows.IoFailedError(str(error))

    def _read_head(self, _: flows.ReadHead) -> Any:
        return log.read_head(self._store)

    def _read_foreign(self, _: flows.ReadForeign) -> Any:
        return tuple(log.live_checkpoints(self._store))

    def _append(self, io: flows.Append) -> Any:
        return log.append(self._store, io.record)

    def _put_claim(self, io: flows.PutClaim) -> Any:
        return log.put_claim(self._store, io.claim)

    def _has_index(self, io: flows.HasIndex) -> bool:
        try:
            self._store.size(index_name(io.prefix))
        except ObjectMissingError:
            return False
        return True

    def _put_metadata(self, io: flows.PutMetadata) -> ShardReport:
        plan, layouts = self._plan_of(io.save)
        plan_id, entries = self._partitioned
        if plan_id != plan.plan_id:
            # Once a plan: with a million slices it takes longer than all the rest of a commit.
            entries = partitioned_entries(plan)
            self._partitioned = plan.plan_id, entries
        raw, report = metadata_shard(io.save, entries, layouts, self._clock())
        self._store.put(report.path, raw)
        return report

    def _put_index(self, io: flows.PutIndex) -> int:
        plan, _ = self._plan_of(io.save)
        raw = merged_index(io.save, plan, io.metadata)
        self._store.put(index_name(io.save.prefix), raw)
        shards: list[ShardReport] = [io.metadata, *io.save.shards.values()]
        return len(raw) + sum(shard.nbytes for shard in shards)

    def _repair_state(self, _: flows.RepairState) -> None:
        log.repair_state_file(self._store)

    def _read_state(self, _: flows.ReadState) -> frozenset[str]:
        held = self._store.read_versioned("checkpoint")
        if held is None:
            return frozenset()
        try:
            state = parse_state_file(held[0])
        except DamagedError:
            return frozenset()
        return frozenset({*state.all_paths, *([state.newest] if state.newest else [])})

    def _list_pins(self, _: flows.ListPins) -> set[str]:
        return log.list_pins(self._store, self._clock())

    def _list_claims(self, _: flows.ListClaims) -> tuple[Any, ...]:
        return tuple(log.list_claims(self._store))

    def _delete_index(self, io: flows.DeleteIndex) -> None:
        self._store.delete(index_name(io.prefix))

    def _delete_data(self, io: flows.DeleteData) -> None:
        folder = io.prefix.rpartition("/")[0]
        for info in self._store.list(folder):
            parsed = parse_shard_name(info.path)
            if parsed is not None and (parsed[0], parsed[2]) == (io.prefix, io.num_shards):
                self._store.delete(info.path)
        self._store.delete(graph_name(io.prefix))
        if io.attempt:
            self._store.delete(timeline_path(io.attempt))

    def _delete_claim(self, io: flows.DeleteClaim) -> None:
        log.delete_claim(self._store, io.prefix)

    def _prune_log(self, _: flows.PruneLog) -> None:
        head = log.read_head(self._store)
        if head is not None:
            log.prune(self._store, head)

    def _list_agents(self, _: flows.ListAgents) -> Mapping[str, str]:
        return self._agents()

    def _committed(self, io: flows.Committed) -> None:
        self._store.put(timeline_path(io.save.attempt), encode_timeline(io.save, self._clock()))


_ACTIONS: dict[type[flows.Io], Callable[[Executor, Any], Any]] = {
    flows.ReadHead: Executor._read_head,
    flows.ReadForeign: Executor._read_foreign,
    flows.Append: Executor._append,
    flows.PutClaim: Executor._put_claim,
    flows.HasIndex: Executor._has_index,
    flows.PutMetadata: Executor._put_metadata,
    flows.PutIndex: Executor._put_index,
    flows.RepairState: Executor._repair_state,
    flows.ReadState: Executor._read_state,
    flows.ListPins: Executor._list_pins,
    flows.ListClaims: Executor._list_claims,
    flows.DeleteIndex: Executor._delete_index,
    flows.DeleteData: Executor._delete_data,
    flows.DeleteClaim: Executor._delete_claim,
    flows.PruneLog: Executor._prune_log,
    flows.Committed: Executor._committed,
    flows.ListAgents: Executor._list_agents,
}


def encode_timeline(save: SaveState, committed: float) -> bytes:
    """Who did what when, in seconds since the epoch, as JSON; never read by the protocol."""
    return json.dumps(
        {
            "step": save.step,
            "generation": save.key[0],
            "attempt": save.attempt,
            "prefix": save.prefix,
            "opened": save.opened,
            "committed": committed,
            "snapshots": [
                {"rank": s.rank, "due": s.due, "sealed": s.sealed, "trigger": s.trigger}
                for _, s in sorted(save.segments.items())
            ],
            "shards": [
                {
                    "writer": s.writer,
                    "rank": rank,
                    "host": s.host,
                    "try": s.attempt_try,
                    "nbytes": s.nbytes,
                    "began": s.began,
                    "seconds": s.seconds_s,
                }
                for rank, segment in sorted(save.segments.items())
                for writer in range(segment.writer_base, segment.writer_base + segment.writers)
                if (s := save.shards.get(writer)) is not None
            ],
        }
    ).encode()
