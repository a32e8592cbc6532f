"""How often the processes speak where nothing has changed, and which changes do not wait for that.

Each call costs both sides a fraction of a millisecond, an idle process whose threads it wakes several. So questions
stay open for seconds, fewer a second from each host the more hosts there are, and what is news is sent at once.
"""

from __future__ import annotations

from operator import attrgetter

from ray_ckpt.protocol.messages import HostReport, WorkerReport

IDLE_S = 5.0
WATCHED_S = 1.0
"""While the coordinator wants to know the loops' steps: it is about to propose one, or waits for a rank."""

_HOSTS_A_SECOND = 1250
"""The coordinator's part of a call is below 0.4 ms: so many take less than half a core."""

_BEATS = 4
"""A host is heard of so many times within the deadline for its silence."""


def spread_s(hosts: int) -> float:
    """The interval at which so many hosts can all be heard, a power of two: it seldom changes. 0 for few of them."""
    return 0.0 if hosts <= _HOSTS_A_SECOND else float(1 << (-(-hosts // _HOSTS_A_SECOND) - 1).bit_length())


def poll_s(hosts: int, host_timeout_s: float, *, watched: bool) -> float:
    """How long a host leaves its question open.

    Where the number of hosts decides, `host_timeout_s` is to be extended by `spread_s`.
    """
    return max(spread_s(hosts), min(WATCHED_S if watched else IDLE_S, host_timeout_s / _BEATS))


_STEP = ("step", "stride")
_UNTOLD = ("sequence", *_STEP, "layout", "pending")
_gist = attrgetter(*(name for name in WorkerReport.__dataclass_fields__ if name not in _UNTOLD))
_rest = attrgetter("incarnation", "epoch", "dead", "segments", "shards", "failures")


def is_news(report: WorkerReport, known: WorkerReport | None, *, steps: bool) -> bool:
    """Whether a worker has more to tell than that it goes on; ``steps``: that it goes on is wanted too."""
    if known is None or report.layout is not None or _gist(report) != _gist(known):
        return True
    if not set(report.pending) <= set(known.pending):
        # That an outcome was heard of is no news.
        return True
    return steps and (report.reached, report.stride) != (known.reached, known.stride)


def is_host_news(report: HostReport, known: HostReport | None, *, steps: bool) -> bool:
    """Whether anything can follow from a host's report that does not follow from the one before it."""
    if known is None or report.layouts or len(report.workers) != len(known.workers) or _rest(report) != _rest(known):
        return True
    pairs = zip(report.workers, known.workers, strict=True)
    return any(is_news(new, old, steps=steps) for new, old in pairs)
