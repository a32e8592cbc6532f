"""A class that is imported when it is used behaves as the class itself, and is not imported before."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import pytest

import ray_ckpt
from ray_ckpt.errors import MissingExtraError
from ray_ckpt.frontends.lazy import LazyClass

ROOT = Path(__file__).parents[2]


class Base:
    """As a framework's."""


class Real(Base):
    """The class that is stood for."""

    kind = "real"

    def __init__(self, first: int, second: str = "b") -> None:
        self.values = (first, second)

    @classmethod
    def make(cls) -> Real:
        """With defaults."""
        return cls(1)


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> LazyClass:
    """Stands for `Real`."""
    home = ModuleType("framework_home")
    home.Real = Real  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "framework_home", home)
    return LazyClass("framework_home", "Real", extra="tf", doc="Stands for Real.")


def test_it_makes_instances(lazy: LazyClass) -> None:
    made = lazy(3, second="c")
    assert type(made) is Real
    assert made.values == (3, "c")


def test_it_is_the_class_for_isinstance_and_issubclass(lazy: Any) -> None:
    class Other:
        """Not related."""

    assert isinstance(Real(1), lazy)
    assert not isinstance(Base(), lazy)
    assert isinstance(Real(1), (int, lazy))
    assert issubclass(Real, lazy)
    assert not issubclass(Base, lazy)
    assert issubclass(lazy, Base)
    assert not issubclass(lazy, Other)


def test_it_is_derived_from(lazy: Any) -> None:
    class Derived(lazy):  # type: ignore[misc]
        """A user's."""

        def __init__(self) -> None:
            super().__init__(7)

    assert Derived.__mro__[1:3] == (Real, Base)
    assert Derived().values == (7, "b")


def test_it_shows_what_the_class_shows(lazy: Any) -> None:
    assert lazy.kind == "real"
    assert lazy.make().values == (1, "b")
    assert lazy.__name__ == "Real"
    assert lazy.__doc__ == "Stands for Real."
    assert str(inspect.signature(lazy)) == "(first: 'int', second: 'str' = 'b') -> 'None'"
    assert repr(lazy) == "<class 'ray_ckpt.Real'>"
    with pytest.raises(AttributeError):
        _ = lazy.nothing


def test_it_can_be_used_in_annotations(lazy: Any) -> None:
    assert lazy | None == Optional[lazy]  # noqa: UP045
    assert None | lazy == Optional[lazy]  # noqa: UP045


@pytest.mark.parametrize("name", ["CheckpointSaverHook", "AsyncCheckpointSaverHook"])
def test_a_pickle_names_it(name: str) -> None:
    lazy = getattr(ray_ckpt, name)
    assert pickle.loads(pickle.dumps(lazy)) is lazy
    assert copy.deepcopy(lazy) is lazy


def test_what_is_not_installed_is_named_on_use(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy: Any = LazyClass("framework_missing", "Real", extra="tf", doc="")
    assert not hasattr(lazy, "__wrapped__")
    uses: list[Any] = [lazy, lambda: isinstance(1, lazy), lambda: issubclass(int, lazy), lambda: lazy.kind]
    for use in uses:
        with pytest.raises(MissingExtraError, match=r'needs framework_missing, .* pip install "ray_ckpt\[tf\]"'):
            use()


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_names_of_hooks_load_no_framework() -> None:
    found = run(
        "import sys, pickle, ray_ckpt\n"
        "from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook\n"
        "import inspect, doctest; inspect.unwrap(CheckpointSaverHook); doctest.DocTestFinder().find(ray_ckpt)\n"
        "pickle.dumps(CheckpointSaverHook), repr(CheckpointSaverHook), dir(ray_ckpt), CheckpointSaverHook | None\n"
        "print([m for m in ('tensorflow', 'keras', 'ray') if m in sys.modules])"
    )
    assert found == "[]"


def test_a_missing_tensorflow_is_named_with_its_extra() -> None:
    found = run(
        "import sys; sys.modules['tensorflow'] = None\n"
        "import ray_ckpt\n"
        "try:\n    ray_ckpt.CheckpointSaverHook('d', save_steps=1)\n"
        "except ray_ckpt.errors.MissingExtraError as error:\n    print(error)"
    )
    assert found == (
        'ray_ckpt.CheckpointSaverHook needs tensorflow, which is not installed: pip install "ray_ckpt[tf]"'
    )
