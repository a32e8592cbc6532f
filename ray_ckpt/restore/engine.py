"""Runs planned reads: concurrently, with bounded memory, and says exactly what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ray_ckpt.errors import DamagedError, UsageError
from ray_ckpt.restore.jobs import PieceJob, Wanted, wanted_jobs
from ray_ckpt.restore.reads import Read, plan_reads
from ray_ckpt.restore.stored import StoredCheckpoint, check_extents
from ray_ckpt.types import CHUNK_NBYTES

DEFAULT_THREADS = 8
DEFAULT_BUDGET_NBYTES = 256 << 20
READ_NBYTES = 2 * CHUNK_NBYTES
"""The largest ranged read: long enough to hide a request's latency, short enough to spread over threads."""

Progress = Callable[[int, int], None]
"""Called in the caller's thread with the bytes that are done and those that are to be read in all."""

OnDamage = Callable[[PieceJob, DamagedError], None]
"""What to do about a piece: raise the error, or note it and go on."""

_Result = list[tuple[PieceJob, DamagedError]]


def read_boxes(
    stored: StoredCheckpoint,
    wanted: Iterable[Wanted],
    *,
    threads: int = DEFAULT_THREADS,
    budget_nbytes: int = DEFAULT_BUDGET_NBYTES,
    progress: Progress | None = None,
) -> None:
    """Fill each array with its box of its tensor, bit for bit, every byte verified by a checksum.

    ``wanted``: (name, box, array of the box's shape and the tensor's numpy dtype; object for strings, which
    come as bytes). Reads go straight into the arrays where the layouts allow it. Beside the arrays, at most
    ``budget_nbytes`` are held, or one read (16 MiB, or a string tensor's stored size twice) if that is more.
    After an error the arrays hold anything.

    Raises:
        UsageError, MismatchError: no such tensor, or a box or array that does not fit it.
        ObjectMissingError: a data shard is not there (any more): read the log again.
        DamagedError: bytes are missing or fail their checksum; names file and tensor.
        StorageError: the storage failed.
    """
    if threads < 1 or budget_nbytes < 1:
        raise UsageError(f"threads and budget_nbytes must be positive, found {threads} and {budget_nbytes}")
    jobs = wanted_jobs(stored, wanted)
    # A string is read into one buffer: a damaged index must not make that larger than the file.
    check_extents(stored, {j.name for j in jobs if j.piece.nbytes > READ_NBYTES and not j.is_numeric})
    run_jobs(stored, jobs, threads, budget_nbytes, progress, _raise)


def run_jobs(
    stored: StoredCheckpoint,
    jobs: Iterable[PieceJob],
    threads: int,
    budget_nbytes: int,
    progress: Progress | None,
    on_damage: OnDamage,
) -> None:
    """Read and verify these pieces; ``on_damage`` is called in the caller's thread for each damaged one."""
    sound = []
    for job in jobs:
        if job.piece.nbytes:
            sound.append(job)
        elif job.piece.crc:
            on_damage(job, _named(stored, job, DamagedError(f"no bytes, but a crc32c of {job.piece.crc:08x}")))
    share = budget_nbytes // (2 * threads) // CHUNK_NBYTES * CHUNK_NBYTES
    reads = plan_reads(stored, sound, max(CHUNK_NBYTES, min(READ_NBYTES, share)))
    total = sum(read.nbytes for read in reads)
    done = 0

    def finished(future: Future[_Result], read: Read) -> None:
        nonlocal done
        for job, error in future.result():
            on_damage(job, _named(stored, job, error))
        done += read.nbytes
        if progress is not None:
            progress(done, total)

    _run(stored, reads, threads, budget_nbytes, finished)


def _run(
    stored: StoredCheckpoint,
    reads: Iterable[Read],
    threads: int,
    budget_nbytes: int,
    finished: Callable[[Future[_Result], Read], None],
) -> None:
    """All bookkeeping happens in the calling thread, so that it needs no locks."""
    pending: dict[Future[_Result], tuple[Read, int]] = {}
    in_flight = 0
    pool = ThreadPoolExecutor(threads, "ray-ckpt-read")

    def drain() -> int:
        ready, _ = wait(pending, return_when=FIRST_COMPLETED)
        freed = 0
        for future in ready:
            read, cost = pending.pop(future)
            finished(future, read)
            freed += cost
        return freed

    try:
        for read in reads:
            cost = read.cost
            while pending and (len(pending) >= 2 * threads or in_flight + cost > budget_nbytes):
                in_flight -= drain()
            pending[pool.submit(_guarded, stored, read)] = read, cost
            in_flight += cost
        while pending:
            drain()
    finally:
        # Wait even after an error: a read that still runs writes into the caller's arrays.
        pool.shutdown(wait=True, cancel_futures=True)


def _guarded(stored: StoredCheckpoint, read: Read) -> _Result:
    try:
        return read.run(stored)
    except DamagedError as error:
        return [(job, error) for job in read.jobs]


def _named(stored: StoredCheckpoint, job: PieceJob, error: DamagedError) -> DamagedError:
    path = stored.shard_path(job.piece.shard_id)
    return DamagedError(
        f"{path!r} in {stored.store.url} is damaged: tensor {job.name!r}, {job.piece.nbytes} bytes from"
        f" {job.piece.offset} on: {error}; restore another checkpoint"
    )


def _raise(_job: PieceJob, error: DamagedError) -> None:
    raise error
