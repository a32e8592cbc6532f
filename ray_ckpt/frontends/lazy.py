"""Classes that are imported when they are used: importing TensorFlow takes seconds and half a gigabyte."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, Union

from ray_ckpt.errors import MissingExtraError


class LazyClass:
    """Stands for a class of a module that imports a framework, until something is asked of that class.

    Calling it, `isinstance`, `issubclass`, deriving from it, its signature and its attributes are the real class's;
    each of them imports the module.

    Args:
        module: dotted name of the module with the class.
        name: of the class there, and of this object in ``home``.
        extra: of this package, that installs what the module needs.
        doc: what `help` shows without importing anything.
        home: the module that users import it from; its pickles refer to that.

    Raises:
        MissingExtraError: on use, where the framework is not installed.
    """

    def __init__(self, module: str, name: str, *, extra: str, doc: str, home: str = "ray_ckpt") -> None:
        self._place = (module, name, extra)
        self._found: type | None = None
        self.__name__ = self.__qualname__ = name
        self.__module__ = home
        self.__doc__ = doc

    def _class(self) -> type:
        if self._found is None:
            module, name, extra = self._place
            try:
                self._found = getattr(import_module(module), name)
            except ModuleNotFoundError as error:
                # Of ours none is missing.
                raise MissingExtraError(
                    f"{self.__module__}.{name} needs {error.name}, which is not installed:"
                    f' pip install "ray_ckpt[{extra}]"'
                ) from error
        assert self._found is not None
        return self._found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._class(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._class())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._class())

    def __getattr__(self, name: str) -> Any:
        # Only for what this object lacks. Tools that look at every object of a module ask for names like
        # __wrapped__: only those that issubclass() and signature() need are worth an import.
        if name == "__signature__":
            return inspect.signature(self._class())
        if name.startswith("__") and name != "__bases__":
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        return getattr(self._class(), name)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 (this is what makes "|" work)

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007 (this is what makes "|" work)

    def __reduce__(self) -> str:
        return self.__name__

    def __repr__(self) -> str:
        return f"<class '{self.__module__}.{self.__name__}'>"
