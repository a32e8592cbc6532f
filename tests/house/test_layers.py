"""Imports go one way, frameworks stay out of the way, and the pure core stays pure. Style as a test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("types",),
    ("strict_json",),
    ("bundle",),
    ("plan",),
    ("policy",),
    ("protocol",),
    ("storage",),
    ("log",),
    ("metadata",),
    ("tree", "leaves"),
    ("models",),
    ("snapshot",),
    ("restore",),
    ("target",),
    ("trackable",),
    ("writer",),
    ("catalog",),
    ("timeline",),
    ("coordinator",),
    ("agent",),
    ("train",),
    ("checkpointer",),
    ("frontends",),
    ("cli", "__main__"),
    ("__init__",),
    ("testing",),
)
"""Lowest first: a unit (module or subpackage) may import itself, its own line and the lines before."""

RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
PURE = {"bundle", "plan", "policy", "protocol"}
IMPURE = {
    *("ray", "os", "time", "random", "socket", "threading", "asyncio", "datetime"),
    *("subprocess", "multiprocessing", "concurrent", "secrets", "uuid", "tempfile", "shutil", "fsspec"),
}
FRAMEWORKS = {"tensorflow", "tf_keras", "keras", "jax", "jaxlib", "torch"}
FRAMEWORK_UNITS = {"leaves", "trackable", "frontends"}
FRAMEWORK_HOMES = ("ray_ckpt.frontends.tensorflow", "ray_ckpt.frontends.keras")
"""Their modules derive from a framework's classes, so they import it at once; others import them on first use only."""

Import = tuple[str, int, bool]
"""Dotted name of what is imported, line, whether it happens inside a function or for types only."""


def module_name(path: Path) -> str:
    """``ray_ckpt/storage/local.py`` -> ``ray_ckpt.storage.local``; a package keeps its ``__init__``."""
    return ".".join(path.with_suffix("").parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    base = module.split(".")[: -node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


def _dynamic_target(node: ast.Call) -> str | None:
    called = ast.unparse(node.func).split(".")[-1]
    if called in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return None


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import in the source: absolute, relative, in functions, for types, by importlib."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            yield from ((f"{base}.{alias.name}", node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.Call) and (target := _dynamic_target(node)):
            yield target, node.lineno, deferred
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred or function or _is_type_checking(node))

    yield from visit(ast.parse(source), False)


def unit_of(name: str) -> str:
    """The unit a dotted name of ours belongs to; a name that the package itself exports is ``__init__``'s."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def violations(source: str, module: str) -> list[str]:
    """What one module's imports do against the rules, one line each."""
    unit = module.split(".")[1]
    if unit not in RANK:
        return [f"{module}: '{unit}' is in no layer: put it where it belongs, or add it to LAYERS"]
    found = []
    for name, line, deferred in imports(source, module):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top == "ray_ckpt" and RANK[unit_of(name)] > RANK[unit]:
            found.append(f"{where}: {unit} is below {unit_of(name)}")
        at_home = f"{module}.".startswith(tuple(f"{home}." for home in FRAMEWORK_HOMES))
        if f"{name}.".startswith(tuple(f"{home}." for home in FRAMEWORK_HOMES)) and not (at_home or deferred):
            found.append(f"{where}: it imports a framework, so import it in a function")
        if top in FRAMEWORKS and not (at_home or (unit in FRAMEWORK_UNITS and deferred)):
            found.append(f"{where}: only functions of leaves/, trackable and frontends/ import frameworks")
        if top in IMPURE and unit in PURE:
            found.append(f"{where}: {unit} is pure (no I/O, clock, randomness, threads or Ray)")
    return found


def test_every_module_keeps_the_layers() -> None:
    found = []
    for path in sorted((ROOT / "ray_ckpt").rglob("*.py")):
        found += violations(path.read_text(), module_name(path.relative_to(ROOT)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ray_ckpt.bundle.index", "from ray_ckpt.plan import x"),
        ("ray_ckpt.bundle.index", "from ray_ckpt import plan"),
        ("ray_ckpt.bundle.index", "import ray_ckpt.plan"),
        ("ray_ckpt.bundle.index", "from .. import plan"),
        ("ray_ckpt.bundle.index", "from ..plan import x"),
        ("ray_ckpt.bundle.__init__", "from ..plan import x"),
        ("ray_ckpt.plan", "from .log import x"),
        ("ray_ckpt.plan", "def f():\n    from ray_ckpt.log import x"),
        ("ray_ckpt.plan", "if TYPE_CHECKING:\n    from ray_ckpt.log import x"),
        ("ray_ckpt.plan", "import importlib\nimportlib.import_module('ray_ckpt.log')"),
        ("ray_ckpt.cli.main", "from ray_ckpt import Checkpointer"),
        ("ray_ckpt.cli.main", "from ray_ckpt.testing import x"),
        ("ray_ckpt.__init__", "from ray_ckpt.testing import x"),
        ("ray_ckpt.helpers", ""),
        ("ray_ckpt.leaves.jax", "import jax"),
        ("ray_ckpt.leaves.jax", "try:\n    from jax import numpy\nexcept ImportError: pass"),
        ("ray_ckpt.leaves.jax", "class A:\n    import torch"),
        ("ray_ckpt.writer", "def f():\n    import tensorflow as tf"),
        ("ray_ckpt.frontends.lazy", "import tensorflow"),
        ("ray_ckpt.frontends.lazy", "from .tensorflow import hooks"),
        ("ray_ckpt.__init__", "from ray_ckpt.frontends.tensorflow.hooks import x"),
        ("ray_ckpt.writer", "def f():\n    __import__('torch')"),
        *((f"ray_ckpt.{unit}", "import time") for unit in sorted(PURE)),
        ("ray_ckpt.protocol.machine", "def f():\n    from os import path"),
        ("ray_ckpt.protocol.machine", "import ray.exceptions"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ray_ckpt.plan", "from ray_ckpt.bundle.index import x\nfrom . import errors, types\nimport numpy"),
        (
            "ray_ckpt.bundle.index",
            "from . import dtypes\nfrom .dtypes import x\nfrom ray_ckpt.bundle import y",
        ),
        ("ray_ckpt.bundle.__init__", "from .index import x\nfrom ..types import Box"),
        ("ray_ckpt.tree", "from .leaves import x"),
        ("ray_ckpt.leaves.jax", "from ..tree import x\ndef f():\n    import jax"),
        ("ray_ckpt.frontends.keras", "if TYPE_CHECKING:\n    import keras"),
        ("ray_ckpt.frontends.tensorflow.hooks", "import tensorflow as tf\nfrom .saver_graph import x"),
        ("ray_ckpt.__init__", "def f():\n    from .frontends.tensorflow.hooks import x"),
        ("ray_ckpt.agent", "import os, ray, time"),
        ("ray_ckpt.testing.sim", "from ray_ckpt import Checkpointer\nfrom ray_ckpt.cli import main"),
        ("ray_ckpt.__init__", "from .checkpointer import Checkpointer"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
