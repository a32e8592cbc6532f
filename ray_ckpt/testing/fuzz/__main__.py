"""``python -m ray_ckpt.testing.fuzz --inputs 100000 --seed 0``: hostile inputs to all readers; counts by target."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ray_ckpt.testing.fuzz import Result, fuzz

_SHOWN = 20


def main(
    inputs: Annotated[int, typer.Option(help="How many inputs.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of all inputs, with their numbers.")] = 0,
    start: Annotated[int, typer.Option(help="Number of the first input: to repeat one.")] = 0,
    target: Annotated[str | None, typer.Option(help="Give all inputs to this target.")] = None,
) -> None:
    """Read hostile inputs, print counts by target, and what was not dealt with as it should be."""
    began = time.monotonic()
    result = fuzz(inputs, seed, start, target)
    _print(result)
    wall_s = time.monotonic() - began
    typer.echo(f"{inputs} inputs from {start} of seed {seed} in {wall_s:.0f} s: {len(result.violations)} violations")
    sys.exit(1 if result.violations else 0)


def _print(result: Result) -> None:
    for name, count in sorted(result.inputs.items()):
        typer.echo(f"{name:12} {count:8} inputs {result.accepted[name]:8} accepted")
    for violation in result.violations[:_SHOWN]:
        typer.echo(f"\ninput {violation.number}, {violation.target}: {violation.text}")
    more = len(result.violations) - _SHOWN
    if more > 0:
        typer.echo(f"\nand {more} more")


if __name__ == "__main__":
    typer.run(main)
