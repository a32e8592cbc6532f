"""SIGKILL for processes of a run: its writers in mid-shard, its actors."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError

from ray_ckpt.coordinator import NAMESPACE, agent_name
from ray_ckpt.coordinator.names import coordinator_name
from tests.soak.hosts import Host
from tests.system.waiting import pause

_CALL_S = 5.0
_HUNT_S = 5.0
_OFTEN_S = 0.002
_ANEW_S = 0.5
_WRITING = b"ray::ray_ckpt.write_shard"


def kill_coordinator(url: str) -> bool:
    """Whether there was one that could be killed."""
    return _kill_actor(coordinator_name(url))


def kill_agent(url: str, host: Host) -> bool:
    """Whether there was one on this host that could be killed."""
    return _kill_actor(agent_name(url, host.id))


def _kill_actor(name: str) -> bool:
    try:
        actor = ray.get_actor(name, namespace=NAMESPACE)
        pid = ray.get(actor.pid.remote(), timeout=_CALL_S)
    except (ValueError, RayError, GetTimeoutError):
        return False
    return kill(pid)


def kill(pid: int) -> bool:
    """Whether the process was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_writer(hosts: Iterable[Host]) -> bool:
    """Wait a while for a process that writes a shard, and kill it; False if none was met."""
    raylets = list(hosts)
    end = time.monotonic() + _HUNT_S
    while time.monotonic() < end:
        pids = [process.pid for host in raylets for process in host.processes()[:-1]]
        anew = time.monotonic() + _ANEW_S
        while time.monotonic() < anew:
            if any(_writes(pid) and _kill_while_it_writes(pid) for pid in pids):
                return True
            pause(_OFTEN_S)
    return False


def _writes(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(_WRITING)
    return False


def _kill_while_it_writes(pid: int) -> bool:
    """Stopped first, since a shard takes milliseconds; one that had just finished goes on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        if _writes(pid):
            os.kill(pid, signal.SIGKILL)
            return True
        os.kill(pid, signal.SIGCONT)
    return False
