"""How results look: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ray_ckpt.types import Shape

_PIPE_WIDTH = 10_000
"""Into a file or pipe, lines are as long as they need: folded cells would be hard to parse."""


def stdout() -> Console:
    """A console on stdout; made anew each time, since tests and pipes replace stdout."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def print_json(value: Any) -> None:
    """One JSON document on stdout; dataclasses become objects."""
    typer.echo(json.dumps(value, indent=2, default=_plain))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; columns whose name begins with ">" are right-aligned."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column[0] == ">" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    stdout().print(table)


def note(text: str) -> None:
    """A remark for people, on stderr, so that it never mixes with results."""
    typer.echo(text, err=True)


def size(nbytes: int) -> str:
    """Bytes for people: "1.5 GB"."""
    return decimal(nbytes)


def moment(time_s: float) -> str:
    """Seconds since the epoch as a UTC time."""
    return datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


def shape_text(shape: Shape) -> str:
    """A shape as "4096x1024"; "scalar" for ()."""
    return "x".join(map(str, shape)) if shape else "scalar"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value)
