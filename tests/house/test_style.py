"""Small modules, short functions, documented names, no sleeping tests, no printing library."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ray_ckpt

ROOT = Path(__file__).parents[2]
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """(path relative to the root, text) of every Python file below the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def _code_lines(function: Function) -> int:
    """Lines of a function without its docstring: documentation is not held against it."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def too_long(source: str, path: str) -> list[str]:
    """Modules and functions over the limits."""
    found = []
    if (lines := len(source.splitlines())) > MAX_MODULE_LINES:
        found.append(f"{path}: {lines} lines, at most {MAX_MODULE_LINES}: split it by subject")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and (lines := _code_lines(node)) > MAX_FUNCTION_LINES:
            found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}")
    return found


def undocumented(source: str, path: str) -> list[str]:
    """The module, its public classes and its public functions that have no docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) or not tree.body else [f"{path}: module has no docstring"]
    for node in tree.body:
        public = isinstance(node, (Function, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            found.append(f"{path}:{node.lineno} {node.name} has no docstring")
    return found


def undocumented_exports(package: ModuleType) -> list[str]:
    """Exported classes and functions of ours, and such classes' public methods, without a docstring."""
    found = []
    for name in getattr(package, "__all__", ()):
        value = getattr(package, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not inspect.getdoc(value):
            found.append(f"{name} has no docstring")
        if inspect.isclass(value):
            found += [
                f"{name}.{member} has no docstring"
                for member, what in vars(value).items()
                if not member.startswith("_")
                and (inspect.isroutine(what) or isinstance(what, (property, classmethod, staticmethod)))
                and not inspect.getdoc(getattr(value, member))
            ]
    return found


def sleeps(source: str, path: str) -> list[str]:
    """Uses of `time.sleep`, under whatever name it was imported."""
    found = []
    for node in ast.walk(ast.parse(source)):
        from_time = isinstance(node, ast.ImportFrom) and node.module == "time"
        if from_time and any(alias.name == "sleep" for alias in node.names):
            found.append(f"{path}:{node.lineno} imports sleep: wait for the event instead")
        if isinstance(node, ast.Attribute) and node.attr == "sleep" and ast.unparse(node.value) == "time":
            found.append(f"{path}:{node.lineno} time.sleep: wait for the event instead")
    return found


def prints(source: str, path: str) -> list[str]:
    """Calls of the built-in `print`."""
    return [
        f"{path}:{node.lineno} print: use logging, or say it in cli/"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_modules_and_functions_are_short() -> None:
    found = [v for path, text in sources("ray_ckpt", "tests", "examples", "benchmarks") for v in too_long(text, path)]
    assert not found, "\n".join(found)


def test_public_names_are_documented() -> None:
    found = [v for path, text in sources("ray_ckpt") for v in undocumented(text, path)]
    found += undocumented_exports(ray_ckpt)
    assert not found, "\n".join(found)


def test_no_test_sleeps() -> None:
    found = [v for path, text in sources("tests", "ray_ckpt/testing") for v in sleeps(text, path)]
    assert not found, "\n".join(found)


def test_only_the_command_prints() -> None:
    cli = ("ray_ckpt/cli/", "ray_ckpt/cli.py")
    found = [v for path, text in sources("ray_ckpt") if not path.startswith(cli) for v in prints(text, path)]
    assert not found, "\n".join(found)


def _function(lines: int, docstring_lines: int = 0) -> str:
    docstring = ['    """Doc.', *["    more"] * (docstring_lines - 2), '    """'] if docstring_lines else []
    return "\n".join(["def f():", *docstring, *["    x = 1"] * (lines - 1)])


def test_a_long_module_or_function_is_found() -> None:
    assert too_long("x = 1\n" * (MAX_MODULE_LINES + 1), "m.py")
    assert not too_long("x = 1\n" * MAX_MODULE_LINES, "m.py")
    assert too_long(_function(MAX_FUNCTION_LINES + 1), "m.py")
    assert too_long("async " + _function(MAX_FUNCTION_LINES + 1, docstring_lines=9), "m.py")
    assert not too_long(_function(MAX_FUNCTION_LINES, docstring_lines=9), "m.py")


@pytest.mark.parametrize("source", ["x = 1", '"""Doc."""\ndef f(): ...', '"""Doc."""\nclass A: ...'])
def test_a_missing_docstring_is_found(source: str) -> None:
    assert len(undocumented(source, "m.py")) == 1


def test_private_names_and_empty_modules_need_no_docstring() -> None:
    assert undocumented("", "m.py") == []
    assert undocumented('"""Doc."""\ndef _f(): ...\nclass _A: ...', "m.py") == []


def test_an_undocumented_export_is_found() -> None:
    class Exported:
        """Documented, its members not all."""

        def documented(self) -> None:
            """Documented."""

        def method(self) -> None: ...

        @property
        def attribute(self) -> int: ...

        def _private(self) -> None: ...

    package = ModuleType("package")
    package.__dict__.update(__all__=["Exported", "bare", "LIMIT"], Exported=Exported, bare=lambda: 0, LIMIT=1)
    assert undocumented_exports(package) == [
        "Exported.method has no docstring",
        "Exported.attribute has no docstring",
        "bare has no docstring",
    ]


@pytest.mark.parametrize("source", ["import time\ntime.sleep(1)", "from time import sleep as nap"])
def test_a_sleep_is_found(source: str) -> None:
    assert len(sleeps(source, "t.py")) == 1


def test_a_print_is_found() -> None:
    assert len(prints("def f():\n    print(1)", "m.py")) == 1
    assert not prints("console.print(1)\nlog.info('print(1)')", "m.py")
