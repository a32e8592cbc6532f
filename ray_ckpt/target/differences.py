"""How a restore target and a checkpoint differ, as a text that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ray_ckpt.types import Shape

SHOWN = 20
"""How many names of each kind of difference are listed."""

_CANDIDATES = 1000
"""How many names are searched for a near miss: the search takes time in proportion."""


@dataclass(slots=True)
class Differences:
    """Names of leaves by how they differ; a value says what exactly, "" nothing more.

    ``missing``: in the target only; ``unexpected``: in the checkpoint only; ``changed``: other shape or dtype;
    ``resized``: one value for each worker of another number of them; ``valueless``: would keep the target's own
    value, but it has none. ``spare``: names in the checkpoint that near misses are looked for among.
    """

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    valueless: dict[str, str] = field(default_factory=dict)
    spare: Collection[str] = ()

    def __bool__(self) -> bool:
        return any((self.missing, self.unexpected, self.changed, self.resized, self.valueless))

    def text(self, where: str) -> str:
        """All of it, sorted, the first of each kind by name, and what to do about it."""
        lines = [f"{where} does not fit the target:"]
        lines += _section("missing (in the target, not in the checkpoint)", self._hinted())
        lines += _section("unexpected (in the checkpoint, not in the target)", self.unexpected)
        lines += _section("changed", self.changed)
        lines += _section("saved by another number of workers", self.resized)
        lines += _section("without a value to keep", self.valueless)
        return "\n".join([*lines, f"To restore: {'; '.join(self._remedies())}."])

    def _hinted(self) -> dict[str, str]:
        """The missing names, those that are shown with the most similar name of the checkpoint."""
        shown = set(sorted(self.missing)[:SHOWN])
        candidates = sorted(self.spare)[:_CANDIDATES]
        return {
            name: detail or (near_miss(name, candidates) if name in shown else "")
            for name, detail in self.missing.items()
        }

    def _remedies(self) -> list[str]:
        found = ["change the target"]
        if self.missing:
            found.append("name what was renamed with rename={target's name: checkpoint's name}")
        if self.missing or self.unexpected:
            found.append("keep the target's values of missing leaves and ignore unexpected ones with partial=True")
        if any(detail.endswith(CASTABLE) for detail in self.changed.values()):
            found.append("convert dtypes with cast=True")
        if self.resized:
            found.append('give these leaves PerWorker(value, on_resize="first", "init" or a function)')
        if self.valueless:
            found.append("pass a state with values for these leaves")
        return found


CASTABLE = " (another dtype)"
"""Ends the description of a change that ``cast`` would accept."""


def near_miss(name: str, candidates: Collection[str]) -> str:
    """A hint at the most similar name, or nothing."""
    similar = difflib.get_close_matches(name, candidates, n=1, cutoff=0.7)
    return f"did you mean {similar[0]!r}?" if similar else ""


def form(dtype: str, shape: Shape) -> str:
    """A tensor's type as text: ``float32[8,4]``."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def _section(title: str, names: Mapping[str, str]) -> list[str]:
    if not names:
        return []
    lines = [f"  {len(names)} {title}:"]
    for name in sorted(names)[:SHOWN]:
        lines.append(f"    {name}: {names[name]}" if names[name] else f"    {name}")
    if len(names) > SHOWN:
        lines.append(f"    ... and {len(names) - SHOWN} more")
    return lines
