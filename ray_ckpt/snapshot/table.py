"""What lies in a sealed segment: its entries and how they divide into data shards.

Two lines of JSON: first what concerns the snapshot as a whole, then the entries, which may be many.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from ray_ckpt.types import CHUNK_NBYTES, Box, Layout, RankPlan, Shape


@dataclass(frozen=True, slots=True)
class SaveId:
    """Whose bytes a segment holds, so that it explains itself when the process that filled it is gone.

    ``trigger`` says why the save was made. ``writers`` of the job's ``num_writers``, from ``writer_base`` on,
    write it; ``fingerprint`` names the layout; ``due`` is the wall-clock time at which the save fell due. ``replica``:
    another host's snapshot was copied here. ``directory``: see `types.LogRecord`.
    """

    run: str
    generation: int
    step: int
    rank: int
    world_size: int
    plan_id: str
    trigger: str
    fingerprint: str = ""
    writers: int = 0
    writer_base: int = 0
    num_writers: int = 0
    due: float = 0.0
    replica: bool = False
    directory: str = ""


class Entry(NamedTuple):
    """One rectangle of one tensor: ``nbytes`` bytes from ``start`` on in the data region.

    ``shape`` is the tensor's. ``crc`` is the crc32c of a string entry, which is not that of its bytes as
    stored; None for others: it is computed while they are written.
    """

    name: str
    dtype: str
    shape: Shape
    box: Box
    start: int
    nbytes: int
    crc: int | None


class Place(NamedTuple):
    """Where a copy without a fixed size lies, its crc32c, and the shape of what was copied."""

    start: int
    nbytes: int
    crc: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Table:
    """A sealed segment's contents.

    ``writers[i]`` is the range of entries of the rank's writer i, whose index in the job is
    ``writer_base + i``. ``digests``: by name, of leaves that other ranks hold too, for comparison.
    """

    save: SaveId
    entries: tuple[Entry, ...]
    writers: tuple[tuple[int, int], ...]
    writer_base: int
    digests: Mapping[str, int]


class Sums(NamedTuple):
    """Checksums of a segment: uint32 crc32c of each entry, then of each chunk of those of more than one.

    ``known`` says for which of the writers (and those that the segment does not have) they have been computed; of the
    others ``data`` holds anything, and may be shorter.
    """

    data: bytes
    known: tuple[bool, ...]


def chunks_in(nbytes: int) -> int:
    """How many checksums of chunks an entry of so many bytes has."""
    return -(-nbytes // CHUNK_NBYTES) if nbytes > CHUNK_NBYTES else 0


def encode_save(save: SaveId) -> bytes:
    """The save id as JSON."""
    return _dumps(asdict(save))


def decode_save(data: bytes) -> SaveId:
    """The inverse of `encode_save`. Raises one of `strict_json.MALFORMED`."""
    return _save(json.loads(data))


def _save(values: dict[str, Any]) -> SaveId:
    save = SaveId(**values)
    for field in fields(save):
        found = type(getattr(save, field.name)).__name__
        if found != field.type:
            raise TypeError(f"{field.name}: expected {field.type}, found {found}")
    return save


_NEWLINE = b"\n"
"""JSON has none of its own: in a text it is escaped."""

_fixed_entries: dict[tuple[str, int], bytes] = {}
"""The entries of the last plan: equal for all its saves, and the larger part of the work for small leaves."""


def encode_table(
    save: SaveId,
    plan: RankPlan,
    layout: Layout,
    strings: Sequence[Place],
    digests: Mapping[str, int],
) -> bytes:
    """The table as JSON. ``strings`` are the copies without a fixed size, in order."""
    key = (plan.plan_id, plan.rank)
    fixed = _fixed_entries.get(key)
    if fixed is None:
        rows = [_row(layout, i, plan, c.start, c.nbytes) for i, c in enumerate(plan.copies) if c.start >= 0]
        _fixed_entries.clear()
        fixed = _fixed_entries[key] = _dumps(rows)[1:-1]
    first = len(plan.copies) - len(strings)
    variable = _dumps([_variable_row(layout, first + i, plan, place) for i, place in enumerate(strings)])[1:-1]
    head = {
        "save": asdict(save),
        "writers": [[writer.first, writer.stop] for writer in plan.writers],
        "writer_base": plan.writer_base,
        "digests": dict(digests),
    }
    entries = b",".join(filter(None, (fixed, variable)))
    return b"".join((_dumps(head), _NEWLINE, b"[", entries, b"]"))


def decode_digests(data: bytes) -> Mapping[str, int]:
    """The ``digests`` of an encoded table alone, whatever its number of entries. Raises as `decode_table`."""
    return _digests(json.loads(data.partition(_NEWLINE)[0]))


def _digests(head: dict[str, Any]) -> Mapping[str, int]:
    digests: dict[str, int] = head["digests"]
    return dict(zip(digests.keys(), counts(digests.values()), strict=True))


def decode_table(data: bytes) -> Table:
    """The inverse of `encode_table`. Raises one of `strict_json.MALFORMED`."""
    first, _, second = data.partition(_NEWLINE)
    raw = json.loads(first)
    entries: list[Entry] = []
    last = 0
    # States repeat few shapes and offsets: their objects are made once.
    forms: dict[str, tuple[Shape, Box]] = {}
    for name, dtype, shape, offset, extent, start, nbytes, crc in json.loads(second):
        text = f"{shape}{offset}{extent}"
        form = forms.get(text)
        if form is None:
            form = forms[text] = (counts(shape), Box(counts(offset), counts(extent)))
        if type(name) is not str or type(dtype) is not str or not len(shape) == len(offset) == len(extent):
            raise TypeError(f"entry {len(entries)} is {dtype!r:.80} {name!r:.80} of shape {text:.80}")
        name.isascii() or name.encode()
        counts((start - last, nbytes) if crc is None else (start - last, nbytes, crc))
        last = start
        entries.append(Entry(name, dtype, *form, start, nbytes, crc))
    writers = tuple((first, stop) for first, stop in map(counts, raw["writers"]))
    if any(not first < stop <= len(entries) for first, stop in writers):
        raise ValueError(f"writers {writers} of {len(entries)} entries")
    (base,) = counts((raw["writer_base"],))
    return Table(_save(raw["save"]), tuple(entries), writers, base, _digests(raw))


def counts(numbers: Iterable[Any]) -> tuple[int, ...]:
    """The numbers themselves, all of them counts or places. Raises `ValueError`."""
    found = tuple(numbers)
    for number in found:
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError(f"expected a number that counts something, found {number!r:.80}")
    return found


def _row(layout: Layout, index: int, plan: RankPlan, start: int, nbytes: int, crc: int | None = None) -> list[Any]:
    copy = plan.copies[index]
    leaf = layout.leaves[copy.leaf]
    return [leaf.name, leaf.dtype, leaf.shape, copy.box.offset, copy.box.shape, start, nbytes, crc]


def _variable_row(layout: Layout, index: int, plan: RankPlan, place: Place) -> list[Any]:
    copy = plan.copies[index]
    if place.shape == copy.box.shape:
        return _row(layout, index, plan, place.start, place.nbytes, place.crc)
    # A variant: it is saved whole, in the shape that it has now.
    leaf = layout.leaves[copy.leaf]
    offset = [0] * len(place.shape)
    return [leaf.name, leaf.dtype, place.shape, offset, place.shape, place.start, place.nbytes, place.crc]


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
