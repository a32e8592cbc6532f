"""``ray-ckpt verify``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ray_ckpt import catalog
from ray_ckpt.cli.options import Json, Step, StorageOptions, Url, parse_storage_options
from ray_ckpt.cli.output import print_json, print_table, size, stdout
from ray_ckpt.storage import locate


def verify(
    url: Url,
    step: Step = None,
    as_json: Json = False,
    storage_option: StorageOptions = None,
) -> None:
    """Read every byte of a step (default: of all checkpoints) and compare the checksums; exit code 1 on damage."""
    options = parse_storage_options(storage_option)
    with _progress() as progress:
        reports = catalog.verify(url, step, storage_options=options, progress=progress)
    if as_json:
        is_ok = all(report.ok for report in reports)
        print_json({"url": locate(url).url, "ok": is_ok, "checkpoints": _documents(reports)})
    else:
        columns = (">step", "result", ">tensors", ">size", ">seconds", "prefix")
        print_table(url, columns, map(_row, reports))
        for report in reports:
            for damage in report.damage:
                stdout().print(f"step {report.step}: {damage.text}", markup=False)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def _documents(reports: list[catalog.Report]) -> list[dict[str, object]]:
    return [
        {
            "step": report.step,
            "prefix": report.prefix,
            "ok": report.ok,
            "tensors": report.tensors,
            "bytes": report.bytes,
            "seconds": report.seconds_s,
            "damage": report.damage,
        }
        for report in reports
    ]


def _row(report: catalog.Report) -> tuple[object, ...]:
    result = "ok" if report.ok else f"DAMAGED ({len(report.damage)})"
    return report.step, result, report.tensors, size(report.bytes), f"{report.seconds_s:.2f}", report.prefix


@contextmanager
def _progress() -> Iterator[catalog.VerifyProgress]:
    """One bar a checkpoint, on stderr, only where a person is watching."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(info: catalog.CheckpointInfo, done: int, total: int) -> None:
            if info.prefix not in tasks:
                tasks[info.prefix] = bars.add_task(f"step {info.step}", total=total)
            bars.update(tasks[info.prefix], completed=done)

        yield advance
