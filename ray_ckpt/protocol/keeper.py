"""Retention and sweeping: what leaves the directory, in which order.

A checkpoint dies in this order: a delete record in the log, its index, after a grace its data, its claim, a record that
it is gone. A reader's pin holds it after the first step. Before each, the `checkpoint` file is read again; what it
names is not touched. What is to be kept for good instead is marked in the log. What attempts left behind that never
committed is found by their claims.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from ray_ckpt.policy import Retired, retire
from ray_ckpt.protocol.flows import (
    DeleteClaim,
    DeleteData,
    DeleteIndex,
    Flow,
    Flows,
    Io,
    ListClaims,
    ListPins,
    ReadState,
    RepairState,
    Until,
)
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import DELETE_GRACE_S, JobConfig
from ray_ckpt.types import Claim, Dying, LogRecord

_LOOK_AGAIN_S = 10.0


class Keeper:
    """Deletes in the background; never what is live, pinned, named by `checkpoint` or about to be restored."""

    def __init__(self, flows: Flows, ledger: Ledger) -> None:
        self._flows = flows
        self._ledger = ledger
        self._burying: set[str] = set()
        self._judged = 0
        self._aborted: dict[str, float] = {}
        self._sweep_due = True
        self._sweeping = False
        self._grace_s = DELETE_GRACE_S

    def on_abort(self, attempt: str) -> None:
        """An attempt of this epoch has failed: its files are to be swept, but not before its writers have ended."""
        self._aborted[attempt] = self._ledger.now
        self._sweep_due = True

    @property
    def idle(self) -> bool:
        """Nothing is left to delete."""
        return not self._burying and not self._ledger.head.dying and not self._sweeping

    def update(self, config: JobConfig | None, protected: frozenset[str]) -> None:
        """Look at the log's head after an event."""
        head = self._ledger.head
        # What was left half deleted is finished even where no worker is there any more to say how much to keep.
        self._grace_s = config.delete_grace_s if config else DELETE_GRACE_S
        if config is not None and head.sequence != self._judged:
            self._judged = head.sequence
            if any(self._choose(head, config, protected)):
                self._ledger.submit(lambda now: self._delete_record(head, now, config, protected), lambda _: None)
        for dying in head.dying:
            if dying.checkpoint.prefix not in self._burying:
                self._burying.add(dying.checkpoint.prefix)
                self._flows.start(self._bury(dying))
        if self._sweep_due and not self._sweeping:
            self._sweeping, self._sweep_due = True, False
            self._flows.start(self._sweep())

    @staticmethod
    def _choose(head: LogRecord, config: JobConfig, protected: frozenset[str]) -> Retired:
        present = head.generation.number if head.generation else 0
        return retire(
            head.live,
            max_to_keep=config.max_to_keep,
            keep_every_steps=config.keep_every_steps,
            keep_every_hours=config.keep_every_hours,
            hours_from=config.keep_hours_from,
            hours_grid=config.keep_hours_grid,
            first_generation=present if config.keep_before == 0 else config.keep_before or 0,
            protected=protected,
        )

    def _delete_record(
        self, judged: LogRecord, head: LogRecord, config: JobConfig, protected: frozenset[str]
    ) -> LogRecord | None:
        if head.generation != judged.generation:
            # The settings are those of a start that is over.
            return None
        gone, preserved = self._choose(head, config, protected)
        if not gone and not preserved:
            return None
        return self._ledger.next_record(
            "delete",
            live=tuple(replace(c, preserved=c.preserved or c in preserved) for c in head.live if c not in gone),
            dying=(*head.dying, *(Dying(c, self._ledger.now) for c in gone)),
        )

    # -- flows --------------------------------------------------------------------------------------------

    def _bury(self, dying: Dying) -> Flow:
        prefix = dying.checkpoint.prefix
        yield from self._until_unused(prefix)
        yield from self._ledger.retry(DeleteIndex(prefix))
        yield Until(lambda: self._ledger.now >= dying.time + self._grace_s)
        yield from self._until_unused(prefix)
        yield from self._ledger.retry(DeleteData(prefix, dying.checkpoint.attempt, dying.checkpoint.num_shards))
        yield from self._ledger.retry(DeleteClaim(prefix))
        self._ledger.submit(lambda head: self._buried_record(head, dying), lambda _: self._buried(prefix))

    def _until_unused(self, prefix: str) -> Generator[Io | Until, Any, None]:
        while True:
            yield from self._ledger.retry(RepairState())
            pins = yield from self._ledger.retry(ListPins())
            named = yield from self._ledger.retry(ReadState())
            if prefix not in pins and prefix not in named:
                return
            again = self._ledger.now + _LOOK_AGAIN_S
            yield Until(lambda again=again: self._ledger.now >= again)  # type: ignore[misc]

    def _buried_record(self, head: LogRecord, dying: Dying) -> LogRecord | None:
        if dying not in head.dying:
            return None
        return self._ledger.next_record("delete", dying=tuple(d for d in head.dying if d != dying))

    def _buried(self, prefix: str) -> None:
        self._burying.discard(prefix)

    def _sweep(self) -> Flow:
        """Remove what attempts that will never commit have written: dead epochs' and our own failed ones."""
        start = self._ledger.now
        yield Until(lambda: self._ledger.now >= start + self._grace_s)
        claims = yield from self._ledger.retry(ListClaims())
        for claim in claims:
            if self._is_orphan(claim, start):
                yield from self._sweep_one(claim)
        self._sweeping = False

    def _is_orphan(self, claim: Claim, before: float) -> bool:
        """Whether nothing will commit under this claim: a dead epoch's, or of a save that failed ``before``."""
        head = self._ledger.head
        listed = {c.prefix for c in head.live} | {d.checkpoint.prefix for d in head.dying}
        aborted = self._aborted.get(claim.attempt)
        failed = aborted is not None and aborted <= before
        return claim.prefix not in listed and (claim.epoch < self._ledger.epoch or failed)

    def _sweep_one(self, claim: Claim) -> Generator[Io | Until, Any, None]:
        if claim.step > self._ledger.head.high_water:
            # The claim is what keeps this prefix from being used again: the log must say so before it goes.
            self._ledger.submit(lambda head: self._raise_record(head, claim), lambda _: None)
            yield Until(lambda: self._ledger.head.high_water >= claim.step)
        yield from self._ledger.retry(DeleteIndex(claim.prefix))
        yield from self._ledger.retry(DeleteData(claim.prefix, claim.attempt, claim.num_shards))
        # Once more: a coordinator that is gone may have put it meanwhile, and an index looks like a checkpoint.
        yield from self._ledger.retry(DeleteIndex(claim.prefix))
        yield from self._ledger.retry(DeleteClaim(claim.prefix))
        self._aborted.pop(claim.attempt, None)

    def _raise_record(self, head: LogRecord, claim: Claim) -> LogRecord | None:
        if head.high_water >= claim.step:
            return None
        return replace(
            self._ledger.next_record("abort", high_water=claim.step, attempt=claim.attempt, step=claim.step),
            reason="left behind by a coordinator that is gone",
        )
