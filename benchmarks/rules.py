"""The pure part of measuring: how often, what the ranks' records make together, medians and ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Record = Mapping[str, Any]


def repetitions(seconds: float, wanted: int, budget_s: float) -> int:
    """How often something that takes so long is repeated: as wanted where it fits, at least once."""
    return wanted if seconds * wanted <= budget_s else max(1, int(budget_s / seconds))


def join_saves(ranks: Sequence[Sequence[Record]]) -> list[dict[str, float]]:
    """Quiet saves of all ranks as one: blocked is the slowest rank's, the rest counts from the earliest start."""
    joined = []
    for records in zip(*ranks, strict=True):
        began = min(r["began"] for r in records)
        save = {
            "blocked": max(r["returned"] - r["began"] for r in records),
            "committed": max(r["committed"] for r in records) - began,
            "durable": records[0]["durable"] - began,
            "cpu": sum(r["cpu"] for r in records),
            "cpu_all": records[0]["cpu_all"],
        }
        if "memcpy" in records[0]:
            save["memcpy"] = max(r["memcpy"] for r in records)
            save["crc"] = max(r["crc"] for r in records)
            save["write"] = max(r["write_ended"] for r in records) - min(r["write_began"] for r in records)
        joined.append(save)
    return joined


def join_busy(ranks: Sequence[Sequence[Record]]) -> list[dict[str, float]]:
    """Saves beside the loop: of each, the rank that lost most."""
    return [dict(max(records, key=lambda r: r["lost"])) for records in zip(*ranks, strict=True)]


def join_restores(ranks: Sequence[Sequence[Record]]) -> list[dict[str, float]]:
    """Restores of all ranks as one: from the first start to the last end."""
    return [
        {
            "seconds": max(r["ended"] for r in records) - min(r["began"] for r in records),
            "read": max(r.get("read", 0.0) for r in records),
        }
        for records in zip(*ranks, strict=True)
    ]


def join_verdicts(ranks: Sequence[Record]) -> dict[str, str]:
    """What a flipped byte did to a restore: noticed by one rank is noticed, silent on one is silent."""
    for verdict in ("noticed", "silent", "unharmed"):
        for record in ranks:
            if record["verdict"] == verdict:
                return {"verdict": verdict, "detail": record["detail"]}
    return {"verdict": "unknown", "detail": "no rank came to an end"}


def middle(records: Iterable[Record], value: str | Callable[[Record], float]) -> float | None:
    """The median of a field, or of what a function makes of each record; None of none."""
    get = (lambda r: r[value]) if isinstance(value, str) else value
    found = [get(record) for record in records]
    return median(found) if found else None


def ratio(above: str, below: str) -> Callable[[Record], float]:
    """One field of a record in units of another."""
    return lambda record: record[above] / record[below]


def summary(row: Record) -> dict[str, Any]:
    """The medians of one row of the table; None for what was not measured."""
    saving, restoring = row.get("saving") or {}, row.get("restoring") or {}
    quiet, warm, cold = saving.get("quiet", []), restoring.get("warm", []), restoring.get("cold", [])
    return {
        "n": len(quiet),
        "first_blocked": saving["first"]["blocked"] if saving else None,
        "blocked": middle(quiet, "blocked"),
        "blocked_ratio": middle(quiet, ratio("blocked", "memcpy")),
        "lost": middle(saving.get("busy", []), "lost"),
        "committed": middle(quiet, "committed"),
        "durable": middle(quiet, "durable"),
        "durable_ratio": middle(quiet, ratio("durable", "write")),
        "cpu": middle(quiet, "cpu"),
        "cpu_all": middle(quiet, "cpu_all"),
        "warm_n": len(warm),
        "warm": middle(warm, "seconds"),
        "warm_ratio": middle(warm, ratio("seconds", "read")),
        "cold": middle(cold, "seconds"),
        "cold_ratio": middle(cold, ratio("seconds", "read")),
        "memory": saving.get("memory"),
        "files": saving.get("files"),
        "bytes_ratio": saving["bytes"] / row["nbytes"] if saving else None,
        "flipped": (row.get("flipped") or {}).get("verdict"),
    }


def bounds(rows: Iterable[Record]) -> dict[str, float | None]:
    """Medians of the bounds over all rows of one case in one place, seconds."""
    rows = list(rows)
    quiet = [save for row in rows for save in (row.get("saving") or {}).get("quiet", [])]
    warm = [one for row in rows for one in (row.get("restoring") or {}).get("warm", [])]
    cold = [one for row in rows for one in (row.get("restoring") or {}).get("cold", [])]
    return {
        "memcpy": middle(quiet, "memcpy"),
        "crc": middle(quiet, "crc"),
        "write": middle(quiet, "write"),
        "read": middle(warm, "read"),
        "read_cold": middle(cold, "read"),
    }
