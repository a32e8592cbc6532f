"""A YAML file as a dataclass: unknown names, missing ones and values of another type are errors that say so."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """The file is not what the example takes; names file and field, what was expected and what was found."""


def read(path: str | os.PathLike[str], kind: type[T]) -> T:
    """The file as ``kind``, a dataclass whose fields are int, float, str, bool, such or None, and such dataclasses.

    Raises:
        ConfigError: it cannot be read, or its content does not fit.
    """
    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; paths are relative to {os.getcwd()}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    return build(kind, {} if found is None else found, str(path))


def build(kind: type[T], found: object, where: str) -> T:
    """``found`` as ``kind``; ``where`` begins the texts of errors. Raises `ConfigError`."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected names with values, found {found!r}")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in found:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}"
            raise ConfigError(f"{where}: {name!r} is unknown; {hint}")
    missing = [name for name, f in fields.items() if name not in found and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in found.items()})


def _value(hint: Any, found: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, found, where)  # type: ignore[arg-type]
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if float in allowed and type(found) is int:
        return float(found)
    if type(found) not in allowed:
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
        hint = "; YAML takes a number for text if it is in quotes or like 1e-3: write 1.0e-3" if _numeric(found) else ""
        raise ConfigError(f"{where} must be {names}, found {found!r}{hint}")
    return found


def _numeric(found: object) -> bool:
    try:
        float(found) if isinstance(found, str) else int("")
    except ValueError:
        return False
    return True


def from_command(kind: type[T], description: str, arguments: list[str] | None = None) -> T:
    """The settings of a command: those of ``--config FILE``, then options of the fields' names, which win.

    Errors end the process with their text, as argparse's own do.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML, see examples/configs")
    simple = {name: hint for name, hint in get_type_hints(kind).items() if hint in (int, float, str)}
    for name, hint in simple.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=hint)
    options = vars(parser.parse_args(arguments))
    path = options.pop("config")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        if path is None:
            return build(kind, given, "the command")
        return dataclasses.replace(read(path, kind), **given)  # type: ignore[type-var]
    except ConfigError as error:
        parser.error(str(error))
