"""Arguments that several subcommands share, and what their texts mean."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from ray_ckpt.errors import UsageError

Url = Annotated[str, typer.Argument(help="Checkpoint directory: a path, gs://, s3:// or any fsspec URL.")]
Step = Annotated[int | None, typer.Option("--step", help="Only this step; default: see above.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of tables.")]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="Option of the fsspec file system, or timeout_s=SECONDS; JSON values are taken as such. Repeatable.",
    ),
]

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_storage_options(items: list[str] | None) -> dict[str, Any]:
    """``["anon=true", "token=x"]`` -> ``{"anon": True, "token": "x"}``.

    Raises:
        UsageError: an item is not ``key=value``.
    """
    options: dict[str, Any] = {}
    for item in items or ():
        key, equals, text = item.partition("=")
        if not key or not equals:
            # Only the key: the value may be a secret.
            raise UsageError(f"--storage-option needs KEY=VALUE, found {key!r} without a key or without '='")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def parse_age(text: str) -> float:
    """Seconds in "90s", "30m", "12h" or "1.5d".

    Raises:
        UsageError: not a number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not an age: expected a number and s, m, h or d, as in 12h")
    return float(match[1]) * _UNITS_S[match[2]]
