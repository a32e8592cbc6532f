"""What a figure is traced by: machine, versions, commit, date, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (*("ray_ckpt", "ray", "numpy", "crc32c", "tensorflow", "jax", "orbax-checkpoint", "tensorstore", "torch"),)


def describe(places: dict[str, str], module: str = "benchmarks.run") -> dict[str, str]:
    """Everything by name; ``places``: name of a place -> its directory; ``module`` is what was run."""
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "commit": _commit(),
        "kernel": platform.release(),
        "CPU": f"{os.cpu_count()} x {_field('/proc/cpuinfo', 'model name')}",
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.1f} GiB",
        "Python": platform.python_version(),
    }
    found |= {f"file system of {name}": file_system(path) for name, path in places.items()}
    return found | {name: _version(name) for name in PACKAGES}


def file_system(path: str) -> str:
    """The kind of file system that a directory is on."""
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, fs, *_ = line.split()
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fs
    return kind


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "ray_ckpt")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes in ray_ckpt" if changed else "")
