"""``python -m ray_ckpt.testing.simulator --seeds 100000 --start 0``: many random runs; stops at the first failure."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ray_ckpt.testing.simulator import SimulationError, draw, run


def main(
    seeds: Annotated[int, typer.Option(help="How many runs.")] = 1000,
    start: Annotated[int, typer.Option(help="The first seed.")] = 0,
) -> None:
    """Simulate random scenarios and print what was done."""
    began, commits, events = time.monotonic(), 0, 0
    for seed in range(start, start + seeds):
        try:
            result = run(draw(seed))
        except SimulationError as error:
            typer.echo(str(error))
            sys.exit(1)
        commits += result.commits
        events += result.events
    rate = seeds / (time.monotonic() - began)
    typer.echo(f"{seeds} runs from seed {start}: {commits} commits, {events} events, {rate:.0f} runs a second")


if __name__ == "__main__":
    typer.run(main)
