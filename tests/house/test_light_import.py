"""Importing the package, or what writer tasks import, loads no framework: each costs seconds."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("tensorflow", "tf_keras", "keras", "jax", "jaxlib", "torch")


def frameworks_loaded_by(statement: str) -> list[str]:
    """The frameworks that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nsys.stdout.write(' '.join(m for m in {FRAMEWORKS} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", ["ray_ckpt", "ray_ckpt.writer"])
def test_the_import_is_light(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    assert frameworks_loaded_by(f"import {module}") == []


def test_a_loaded_framework_is_found() -> None:
    assert frameworks_loaded_by("import sys, types\nsys.modules['torch'] = types.ModuleType('torch')") == ["torch"]
