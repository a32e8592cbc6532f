"""Hosts as Linux network namespaces of this machine: each has its address, its processes, and a wire that can be cut.

What they share is the machine's file system and its memory. They reach one another over a bridge and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.cluster import ROOT
from tests.system.waiting import eventually

NODE_S = 240.0
"""Within so long a Ray node starts, on a machine that does much else."""
GCS_PORT = 6379
_TRIES = 5
"""Ray allows a raylet 30 s to start, whatever else the machine does."""
_SWITCH = "sw"
_SUBNET = "10.77.0"
_STORE_NBYTES = 80_000_000
_HEALTH = {"period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "4", "initial_delay_ms": "10000"}
"""Ray gives up a host that is silent for about 10 s, instead of a minute."""


@cache
def why_not() -> str:
    """Why there can be no hosts of this kind here; "" if there can."""
    if shutil.which("ip") is None:
        return "needs the command `ip` (iproute2) for network namespaces"
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    name = f"rc{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        _ip("netns", "del", name)
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


class Host:
    """One of a `Lan`'s hosts."""

    def __init__(self, lan: Lan, number: int) -> None:
        self.address = f"{_SUBNET}.{number}"
        self.namespace = f"{lan.name}-{number}"
        self.memory = lan.folder / f"memory-{number}"
        self._lan = lan
        self._port = f"port{number}"
        self._started: list[subprocess.Popen[bytes]] = []
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._port, "netns", lan.switch, "type", "veth", "peer", "eth0", "netns", self.namespace)
        _ip("-n", lan.switch, "link", "set", self._port, "master", "bridge", "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", self.namespace, "link", "set", device, "up")

    def cut(self) -> None:
        """From now on nothing that is sent from or to this host arrives."""
        _ip("-n", self._lan.switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """The end of `cut`."""
        _ip("-n", self._lan.switch, "link", "set", self._port, "up")

    def run(self, *command: str, log: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start a process here whose output goes to a file of the LAN's folder; ``settings``: more variables."""
        with (self._lan.folder / log).open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**self._lan.environment, **settings},
                cwd=ROOT,
            )
        self._started.append(process)
        return process

    def start_ray(self, head: Host | None = None, **settings: str) -> None:
        """A Ray node: of this head's cluster, or the head of one; ``settings``: more variables."""
        where = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
        if head is not None:
            where = [f"--address={head.address}:{GCS_PORT}"]
        else:
            # What another head of this LAN left behind: Ray would take it for one that still runs on this machine.
            (self._lan.folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        log = f"ray-{self.address}.log"
        size = ("--num-cpus=1", f"--object-store-memory={_STORE_NBYTES}")
        less = ("--disable-usage-stats", "--include-log-monitor=false")
        command = (sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address}")
        for _ in range(_TRIES):
            starting = self.run(*command, *size, *less, *where, log=log, **settings)
            if starting.wait(NODE_S) == 0:
                return
            self.kill()
        raise AssertionError((self._lan.folder / log).read_text())

    def pids(self, name: str = "") -> list[int]:
        """Its processes: all, or those of a program."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(OSError):
                if not name or Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(int(pid))
        return found

    def kill(self, *names: str) -> None:
        """SIGKILL all its processes, or those of these programs, and wait until they are gone."""

        def gone() -> bool:
            left = [pid for name in names or ("",) for pid in self.pids(name)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._started:
                process.poll()
            return not left

        eventually(gone, f"the end of the processes of {self.namespace}")

    def remove(self) -> None:
        """The host with all that runs on it."""
        self.kill()
        _ip("netns", "del", self.namespace)


class Lan:
    """A switch and the hosts at it, whose files lie in a folder of a short path. ``settings`` are Ray's variables."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.name = f"rc{os.getpid()}"
        self.switch = f"{self.name}-{_SWITCH}"
        self.hosts: list[Host] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(folder),
            # Nobody else is on this net, and tokens are kept in the user's home.
            "RAY_AUTH_MODE": "disabled",
            **{f"RAY_health_check_{name}": value for name, value in _HEALTH.items()},
            **settings,
        }
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")

    def add(self) -> Host:
        """One more host."""
        self.hosts.append(Host(self, len(self.hosts) + 1))
        return self.hosts[-1]

    def add_rays(self, number: int) -> Sequence[Host]:
        """One more cluster of so many nodes; the first one is its head."""
        head = self.add()
        head.start_ray()
        return [head, *(self.add_ray(head) for _ in range(number - 1))]

    def add_ray(self, head: Host) -> Host:
        """One more node of this head's cluster."""
        host = self.add()
        host.start_ray(head)
        return host


@contextmanager
def lan_of(**settings: str) -> Iterator[Lan]:
    """A LAN of which nothing is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    lan = Lan(folder, **settings)
    try:
        yield lan
    finally:
        for host in lan.hosts:
            host.remove()
        _ip("netns", "del", lan.switch)
        shutil.rmtree(folder, ignore_errors=True)
