"""Ends the processes of a run at chosen actions, with SIGKILL, from inside and without a line in the product.

Ray calls `install` at the start of each process whose runtime environment names it (see `environment`); agents and
coordinators inherit that from the workers that start them. A test arms a point by a file, which the first process that
comes by removes before it dies: so it is struck once, also where Ray starts the process again.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray_ckpt.coordinator import run_id

FOLDER = "RAY_CKPT_KILL_POINTS"
_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""What Ray makes of ``worker_process_setup_hook`` (ray/_private/ray_constants.py), here for some processes only."""

_me: dict[str, str] = {}

Kind = Callable[..., str]


def environment(folder: Path) -> dict[str, Any]:
    """The runtime environment of workers whose run can be struck."""
    return {"env_vars": {FOLDER: str(folder), _HOOK: "tests.system.kill_hook.install"}}


def arm(folder: Path, url: str, who: str, action: str, when: str) -> Path:
    """Have the next process that comes by the point be killed; the file that is there until then."""
    path = folder / run_id(url)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([who, action, when]))
    partial.rename(path)
    return path


def install() -> None:
    """Watch all actions in this process."""
    from ray_ckpt import writer

    # First: Ray finds a task by its name in its module, so that must be what the pool of an agent has imported.
    _watch_writer(writer)
    from ray_ckpt.agent import actor as agents
    from ray_ckpt.agent import mirror
    from ray_ckpt.agent.memory import HostMemory
    from ray_ckpt.agent.serving import RemoteSource
    from ray_ckpt.coordinator.actor import Coordinator
    from ray_ckpt.coordinator.executor import Executor
    from ray_ckpt.protocol.host import HostLogic

    _introduce(Coordinator, "coordinator")
    _introduce(agents.Agent, "agent")
    _watch(Executor, "run", _name_of_io)
    for home, method, action in (
        (agents.Agent, "_write_try", "start write"),
        (HostLogic, "on_written", "written"),
        (HostLogic, "on_view", "view"),
        (HostMemory, "prepare", "prepare"),
        (HostMemory, "keep_layout", "keep layout"),
        (HostMemory, "next_try", "next try"),
        (HostMemory, "free", "free"),
        (HostMemory, "keep", "keep"),
        (agents.Agent, "_have_mirrored", "mirror"),
        (agents.Agent, "_mirror", "peer mirrors"),
        (RemoteSource, "read_into", "peer pulls"),
        (mirror, "sum_up", "peer sums"),
    ):
        _watch(home, method, lambda *_, action=action: action)


def _name_of_io(_: Any, io: Any) -> str:
    """Records of the log are told apart by their kind."""
    name = type(io).__name__
    return f"{name}:{io.record.kind}" if name == "Append" else name


def _introduce(actor: type[Any], who: str) -> None:
    made = actor.__init__

    @functools.wraps(made)
    def make(self: Any, url: str, *arguments: Any, **options: Any) -> None:
        _me.update(who=who, run=run_id(url))
        made(self, url, *arguments, **options)

    actor.__init__ = make


def _watch(home: Any, method: str, kind: Kind) -> None:
    original = getattr(home, method)
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def watched(*arguments: Any, **options: Any) -> Any:
            action = kind(*arguments)
            _strike(action, "before")
            result = await original(*arguments, **options)
            _strike(action, "after")
            return result

    else:

        @functools.wraps(original)
        def watched(*arguments: Any, **options: Any) -> Any:
            action = kind(*arguments)
            _strike(action, "before")
            result = original(*arguments, **options)
            _strike(action, "after")
            return result

    setattr(home, method, watched)


def _watch_writer(module: Any) -> None:
    """A writer is one task: before its first byte, after its first block, and when its shard is there."""
    write, blocks = module.write_shard, module._Shard.blocks

    @functools.wraps(write)
    def write_shard(*arguments: Any, store: Any, **options: Any) -> Any:
        _me.update(who="writer", run=run_id(store.url))
        _strike("shard", "before")
        report = write(*arguments, store=store, **options)
        _strike("shard", "after")
        return report

    def watched_blocks(self: Any) -> Iterator[memoryview]:
        for block in blocks(self):
            yield block
            _strike("block", "after")

    module.write_shard, module._Shard.blocks = write_shard, watched_blocks


def _strike(action: str, when: str) -> None:
    if "run" not in _me:
        return
    path = Path(os.environ[FOLDER], _me["run"])
    try:
        armed = json.loads(path.read_text())
        if armed == [_me["who"], action, when]:
            # Whoever removes the file is the one that dies.
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    except FileNotFoundError:
        return
