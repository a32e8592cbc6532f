"""What the processes tell each other: frozen reports (upwards) and views (downwards)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ray_ckpt.types import Checkpoint, Layout, RankPlan, ShardReport

Overlap = Literal["wait", "skip", "coalesce"]
ProposalKind = Literal["save", "stop"]
Trigger = Literal["cadence", "proposal", "explicit", "final", "memory"]
"""Why a snapshot was taken; "memory": for a restart only, no save is made of it."""


DELETE_GRACE_S = 60.0
"""How long deleted data lies on where no job says otherwise."""


BASENAME = "model.ckpt"
"""How prefixes begin where no job says otherwise; what `tf.train` calls its checkpoints."""


@dataclass(frozen=True, slots=True)
class JobConfig:
    """The settings that every rank of a job must share.

    ``save_steps`` / ``save_secs``: the cadence, at most one of them. ``memory_steps``: that of snapshots which only lie
    in host memory. ``replicas``: on how many other hosts each snapshot has a copy (0 or 1); ``replica_bytes_per_s``
    bounds the rate that each host copies at. ``overlap``: what to do when a save is
    due and no snapshot memory is free. ``max_failures``: failed saves in a row before the job stops.
    ``start``: what tells this start of the job from others, rising from start to start where it is given: then a
    process of an older start that was never told to go is not taken for a rank of this one. ``*_timeout_s``:
    deadlines; every wait in the protocol has one. ``basename``: prefixes are ``<basename>-<step>``. ``keep_before``:
    retention leaves checkpoints of generations below this number alone; 0 stands for the present one.
    ``keep_hours_from``: the time that ``keep_every_hours`` counts from until a checkpoint is kept so;
    ``keep_hours_grid``: instead, the time from which on one is kept for each so many hours. These three may differ, as
    each rank has them from its own clock or framework: rank 0's count. ``delete_grace_s``: how long the data of a
    deleted checkpoint outlives its index, for readers without a pin.
    """

    world_size: int
    save_steps: int | None = None
    save_secs: float | None = None
    memory_steps: int | None = None
    replicas: int = 0
    replica_bytes_per_s: float | None = None
    stride: int = 1
    overlap: Overlap = "wait"
    slots: int = 2
    max_tries: int = 3
    max_failures: int = 3
    max_to_keep: int | None = 5
    keep_every_steps: int | None = None
    keep_every_hours: float | None = None
    keep_before: int | None = field(default=None, compare=False)
    keep_hours_from: float | None = field(default=None, compare=False)
    keep_hours_grid: float | None = field(default=None, compare=False)
    basename: str = BASENAME
    save_timeout_s: float = 1800.0
    settle_timeout_s: float = 120.0
    host_timeout_s: float = 30.0
    delete_grace_s: float = DELETE_GRACE_S
    fresh: bool = False
    start: str = ""


@dataclass(frozen=True, slots=True)
class RestoreWish:
    """What a worker asked for: ``newest``, ``step`` (that one) or ``none`` (it trains without a restore).

    ``stored``: files in the store are wanted, as something else reads them.
    """

    kind: Literal["newest", "step", "none"]
    step: int | None = None
    stored: bool = False


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """How the read of one round ended on one worker; ``damage`` is None when all bytes were good."""

    generation: int
    round: int
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A step at which all workers shall save (or stop). Decided once every rank has accepted it.

    ``error``: a stop with an error is raised by `step()` on every worker instead of setting `should_stop`.
    ``preempted``: it stops because a host is about to go.
    """

    id: str
    step: int
    kind: ProposalKind = "save"
    state: Literal["open", "decided", "dropped"] = "open"
    reason: str = ""
    error: str | None = None
    preempted: bool = False


@dataclass(frozen=True, slots=True)
class StopWish:
    """Why a worker wants all to save and stop; ``preempted``: since its process or host is about to go."""

    reason: str
    preempted: bool = False


@dataclass(frozen=True, slots=True)
class Leaving:
    """A host is about to go; ``text`` is what people should read. ``drained``: it takes no new work any more.

    Where it is not, it shares the fate of a host that is: both are of one TPU slice.
    """

    text: str
    drained: bool = True


@dataclass(frozen=True, slots=True)
class Nodes:
    """What Ray says of its cluster: the nodes that are dead, and the failure domain of each that lives (by id)."""

    dead: frozenset[str] = frozenset()
    domains: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The whole state of one training process, as far as others need it.

    ``step`` is the last one that entered `step()` (-1: none yet); ``bound`` one that the loop may have come to without
    saying so (-1: it says so always). ``accepted`` are proposals this worker is
    bound to, ``refused`` ids it came too late for. ``waiting_step``: `step()` is held at that
    step for a plan. ``skipped`` are saves this worker could not snapshot, with the reason. ``layout`` is
    None once the view has acknowledged ``fingerprint``. ``started``: this worker has been told that all ranks have
    restored, so it is bound to its generation; until then it may be drafted into a newer one. ``pending`` are steps
    it snapshotted or skipped without having heard how the save ended; ``due_step`` is one it is still about to
    snapshot, held in `step()` for a plan or for memory. ``closed``: it has finished and all that it had to save is
    committed, so nobody needs its memory.
    """

    worker: str
    sequence: int
    rank: int
    config: JobConfig
    generation: int | None = None
    started: bool = False
    roll_call: int = -1
    restore: RestoreWish | None = None
    restored: RestoreResult | None = None
    fingerprint: str | None = None
    layout: Layout | None = None
    plan_id: str | None = None
    step: int = -1
    bound: int = -1
    stride: int = 1
    waiting_step: int | None = None
    due_step: int | None = None
    accepted: tuple[Proposal, ...] = ()
    refused: tuple[str, ...] = ()
    requests: tuple[tuple[str, str], ...] = ()
    stop_request: StopWish | None = None
    skipped: tuple[tuple[int, str], ...] = ()
    pending: tuple[int, ...] = ()
    finished: bool = False
    closed: bool = False

    @property
    def reached(self) -> int:
        """How far the loop may be: proposals up to this step come too late."""
        return max(self.step, self.bound)


@dataclass(frozen=True, slots=True)
class SaveOutcome:
    """How one save ended. ``prefix`` of a committed one, ``error`` of a failed one.

    ``quiet``: it was given up in the course of finding a step that suits all workers; nothing is wrong.
    """

    generation: int
    step: int
    state: Literal["committed", "failed"]
    prefix: str = ""
    error: str = ""
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the job cannot go on as it is; ``kind`` is the class of `ray_ckpt.errors` that each worker raises."""

    kind: Literal["UsageError", "StateError", "NoCheckpointError", "DamagedError", "UnavailableError"]
    text: str


Holders = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class RestoreDecision:
    """What all ranks of a generation read: a checkpoint, or a newer ``snapshot`` (generation, step); or nothing.

    ``holders``: by rank of the start that saved it, the hosts in whose memory the bytes lie, or have lain a moment ago;
    empty where they do not.
    """

    generation: int
    round: int
    checkpoint: Checkpoint | None
    note: str = ""
    snapshot: tuple[int, int] | None = None
    holders: Holders = ()
    directory: str = ""

    @property
    def step(self) -> int | None:
        """The step that it is of."""
        if self.snapshot is not None:
            return self.snapshot[1]
        return self.checkpoint.step if self.checkpoint is not None else None

    @property
    def key(self) -> tuple[int, int]:
        """(generation, round): a later decision replaces an earlier one."""
        return self.generation, self.round


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the coordinator has decided, as far as one worker is concerned.

    ``refused``: this process belongs to a start of the job that is over, or cannot join; the reason.
    ``error``: the job cannot go on as it is (raised by the next call); ``late``: whom the coordinator waits for.
    ``plan`` was made for the layout ``plan_fingerprint``; ``fingerprint`` is the layout that has arrived. ``poll_s``:
    how long the worker leaves its question for the next view open. ``loose``: saves whose snapshots lie here and that
    no restart counts on.
    """

    worker: str
    roll_call: int = -1
    generation: int | None = None
    refused: str | None = None
    error: Problem | None = None
    restore: RestoreDecision | None = None
    restore_done: bool = False
    fingerprint: str | None = None
    plan: RankPlan | None = None
    plan_fingerprint: str | None = None
    proposals: tuple[Proposal, ...] = ()
    outcomes: tuple[SaveOutcome, ...] = ()
    requests: tuple[tuple[str, SaveOutcome], ...] = ()
    late: str = ""
    poll_s: float = 1.0
    loose: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A sealed snapshot in a host's memory.

    ``writers`` of the job's ``num_writers``, from ``writer_base`` on, write it. ``digests``: crc32c of the leaves of
    several ranks checked, by leaf name. ``due`` and ``sealed`` are wall-clock times, for people. ``fills`` tells it
    from what the segment held before and will hold later. ``kept``: it may be overwritten at any time. ``replica``: it
    is a copy of what lies or lay in another host's memory. ``alone``: no copy of it will be made. ``directory``: see
    `types.LogRecord`.
    """

    rank: int
    generation: int
    step: int
    world_size: int
    plan_id: str
    trigger: Trigger
    writers: int
    writer_base: int
    num_writers: int
    fingerprint: str = ""
    digests: tuple[tuple[str, int], ...] = ()
    name: str = ""
    due: float = 0.0
    sealed: float = 0.0
    fills: int = 0
    kept: bool = False
    replica: bool = False
    alone: bool = False
    directory: str = ""

    @property
    def save(self) -> tuple[int, int]:
        """The save it belongs to: (generation, step)."""
        return self.generation, self.step


@dataclass(frozen=True, slots=True)
class WriteFailure:
    """A shard that could not be written in any of its tries."""

    attempt: str
    writer: int
    error: str


@dataclass(frozen=True, slots=True)
class HostReport:
    """The whole state of one host: its workers, its sealed snapshots, its finished shards.

    ``dead`` are worker ids whose process is gone. ``layouts`` are those of sealed snapshots whose
    fingerprint the coordinator has not acknowledged; they come from the snapshot itself, so they
    outlive the training process. ``epoch`` is the highest that a view came from.
    """

    host: str
    incarnation: str
    sequence: int
    epoch: int = 0
    name: str = ""
    workers: tuple[WorkerReport, ...] = ()
    dead: tuple[str, ...] = ()
    segments: tuple[SegmentInfo, ...] = ()
    layouts: tuple[Layout, ...] = ()
    shards: tuple[ShardReport, ...] = ()
    failures: tuple[WriteFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class WriteOrder:
    """Write every sealed snapshot of this save that you hold. Shard of try t of writer i: t*W + i.

    ``done`` are those of the host's writers whose report has arrived at the coordinator. ``replicas``: ranks whose copy
    here is to be written, since their own host is gone; the tries of copies are ``max_tries`` to 2 * ``max_tries`` - 1.
    """

    attempt: str
    generation: int
    step: int
    plan_id: str
    prefix: str
    num_writers: int
    max_tries: int
    done: tuple[int, ...] = ()
    replicas: tuple[int, ...] = ()
    copies: int = 1

    @property
    def epoch(self) -> int:
        """The epoch of the coordinator that gave the order; it rises from attempt to attempt of one save."""
        return int(self.attempt[1:].partition("-")[0])

    @property
    def num_shards(self) -> int:
        """The number in every file name: all tries of all writers, and the coordinator's own shard."""
        return self.num_writers * self.max_tries * self.copies + 1

    @property
    def save(self) -> tuple[int, int]:
        """The save it belongs to: (generation, step)."""
        return self.generation, self.step


@dataclass(frozen=True, slots=True)
class HostView:
    """What concerns one host.

    No save needs a snapshot any more if its own is in ``decided`` or its generation is below ``oldest_generation``;
    those before ``kept_from``, in the order of (generation, step), no restart needs either. ``peer``: the host that
    copies this one's snapshots; empty for none. ``directory``: what lies in memory of any other is of a directory that
    was deleted (see `types.LogRecord`), and not needed.
    ``fingerprints`` are the layouts that have arrived. ``poll_s``: how long the host leaves its question for the next
    view open. ``watched``: the steps of its workers' loops are news as well.
    """

    epoch: int
    version: int
    workers: tuple[WorkerView, ...] = ()
    orders: tuple[WriteOrder, ...] = ()
    decided: tuple[tuple[int, int], ...] = ()
    oldest_generation: int = 0
    fingerprints: tuple[str, ...] = ()
    poll_s: float = 1.0
    watched: bool = False
    kept_from: tuple[int, int] = (0, 0)
    peer: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """One undecided save, for people: what it waits for and who is late."""

    generation: int
    step: int
    state: str
    attempt: str
    sealed: int
    shards_done: int
    shards: int
    late: str


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A coordinator's own view of its run, for `Checkpointer.status()` and the command line.

    ``memory_step``: the newest step that lies whole in host memory; ``replicated_step``: of which every rank's part
    lies on a second host as well.
    """

    url: str
    phase: str
    epoch: int
    generation: int | None
    world_size: int
    steps: tuple[int, ...]
    saves: tuple[SaveStatus, ...]
    checkpoints: tuple[Checkpoint, ...]
    failures_in_a_row: int
    last_error: str
    waiting: str
    notes: tuple[str, ...] = field(default=())
    memory_step: int | None = None
    replicated_step: int | None = None
