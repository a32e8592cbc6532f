"""What a person sees while the demo runs: a live table in a terminal, a line now and then in a file or pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from examples.demo.journal import Story

_LINE_EVERY_S = 3.0
_PIPE_WIDTH = 160


def make_console() -> Console:
    """A console on stdout; into a file or pipe with lines that are not folded."""
    # With its own file, it goes on writing there while the stdout of others is redirected.
    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=_PIPE_WIDTH)


def speed(story: Story) -> float:
    """Steps a second of one process, over its last ten."""
    recent = story.steps[-10:]
    return len(recent) / max(recent[-1].ended - recent[0].began, 1e-9) if recent else 0.0


def saves_text(status: Any) -> str:
    """The saves that are under way, in words; ``status`` is a `RunStatus`, or None before there is one."""
    if status is None or not status.saves:
        return "no save under way"
    return "; ".join(
        f"save of step {s.step}: {s.sealed}/{status.world_size} snapshots, {s.shards_done}/{s.shards} shards, {s.state}"
        for s in status.saves
    )


def progress_line(start: int, stories: Sequence[Story], status: Any) -> str:
    """The whole job in one line."""
    steps = stories[0].steps
    if not steps:
        return f"start {start}: {len(stories)} processes compile and restore"
    last = steps[-1]
    return (
        f"start {start}: step {last.step:4d}  loss {last.loss:.3f}  on the fixed batch {last.eval_loss:.3f}  "
        f"{speed(stories[0]):4.1f} steps/s  {saves_text(status)}"
    )


class Display:
    """Shows one start of the job; as a context manager. New commits are told in lines that stay."""

    def __init__(self, console: Console, start: int, committed: set[int]) -> None:
        self.committed = committed
        self._console = console
        self._start = start
        self._next_line = 0.0
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, stories: Sequence[Story], status: Any) -> None:
        """Bring what is shown up to date."""
        self._tell_commits(status)
        if self._live is not None:
            self._live.update(self._table(stories, status), refresh=True)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY_S
            self._console.print(progress_line(self._start, stories, status))

    def _tell_commits(self, status: Any) -> None:
        for checkpoint in status.checkpoints if status is not None else ():
            if checkpoint.step not in self.committed:
                self.committed.add(checkpoint.step)
                text = f"step {checkpoint.step}: {checkpoint.nbytes / 1e6:.1f} MB from {checkpoint.world_size} hosts"
                self._console.print(f"  [green]committed[/] {text}")

    def _table(self, stories: Sequence[Story], status: Any) -> Table:
        table = Table(title=f"start {self._start}: {saves_text(status)}", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("host", "rank", "step", "loss", "fixed batch", "steps/s", "snapshots", "last stall"):
            table.add_column(column, justify="right")
        for story in stories:
            table.add_row(*_row(story))
        return table


def _row(story: Story) -> list[str]:
    ids = [str(story.host), str(story.rank)]
    if not story.steps:
        return [*ids, "starts", "", "", "", "", ""]
    last = story.steps[-1]
    stalls = [event.stalled_s for event in story.steps if event.saved]
    stall = f"{stalls[-1] * 1e3:.1f} ms" if stalls else ""
    losses = [f"{last.loss:.3f}", f"{last.eval_loss:.3f}"]
    return [*ids, str(last.step), *losses, f"{speed(story):.1f}", str(len(stalls)), stall]
