"""``ray-ckpt plan``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated

import typer

from ray_ckpt.cli.options import Json, StorageOptions, parse_storage_options
from ray_ckpt.cli.output import note, print_json, print_table, size
from ray_ckpt.cli.shapes import read_state
from ray_ckpt.errors import UsageError
from ray_ckpt.models import HostMesh, Outlook, Rates, outlook

_DEFAULTS = Rates(
    20e9, 1.9e9, 1.2e9, "this project's benchmark machine: memory, a local disk (benchmarks/results/table.md)"
)
_SHOWN = 5

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A published model: see docs/planning.md, or a .json or .yaml file of tensors."
    ),
]
Hosts = Annotated[int, typer.Option("--hosts", min=1, help="Processes that train, one a host.")]
Devices = Annotated[int, typer.Option("--devices-per-host", min=1, help="Chips of each host.")]
Axis = Annotated[int, typer.Option(min=1, help="Devices along this axis of the mesh.")]
DataAxis = Annotated[int | None, typer.Option("--data", min=1, help="Copies of the state; default: what is left.")]
Snapshots = Annotated[int, typer.Option("--snapshots", min=1, help="As Checkpointer(snapshots=...).")]
Rate = Annotated[float | None, typer.Option(min=1.0, help="Bytes a second of one host, as in 2.5e9.")]
Measure = Annotated[
    str | None,
    typer.Option(
        "--measure", metavar="URL", help="Measure the rates on this host with this directory: 2 GB of traffic."
    ),
]


def plan(
    model: ModelName,
    hosts: Hosts = 1,
    devices_per_host: Devices = 4,
    data: DataAxis = None,
    fsdp: Axis = 1,
    tensor: Axis = 1,
    snapshots: Snapshots = 2,
    snapshot_rate: Rate = None,
    write_rate: Rate = None,
    read_rate: Rate = None,
    measure: Measure = None,
    as_json: Json = False,
    storage_option: StorageOptions = None,
) -> None:
    """Plan a save of a state that need not exist: shards, bytes and memory a host, and the time it should take.

    The devices form a mesh of data x fsdp x tensor, host by host. It is the plan that a real save would make.
    """
    title, state = read_state(model)
    devices = hosts * devices_per_host
    if data is None and devices % (fsdp * tensor):
        raise UsageError(
            f"{hosts} hosts of {devices_per_host} devices are {devices}, which fsdp {fsdp} x tensor {tensor} does not"
            " divide; choose axes whose product does"
        )
    axes = {"data": data or devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
    mesh = HostMesh(axes, hosts)
    if mesh.num_devices != devices:
        raise UsageError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} is {mesh.num_devices} devices, but {hosts} hosts of"
            f" {devices_per_host} have {devices}"
        )
    given = {"snapshot": snapshot_rate, "write": write_rate, "read": read_rate}
    rates = _rates(measure, given, storage_option)
    found = outlook(state, mesh, rates, snapshots)
    if as_json:
        print_json({"model": model, "mesh": axes, "rates": asdict(rates), **asdict(found)})
    else:
        _print(title, axes, rates, found)


def _rates(url: str | None, given: dict[str, float | None], storage_option: list[str] | None) -> Rates:
    rates = _DEFAULTS
    if url is not None:
        # What measures takes longer to import than a plan does.
        from ray_ckpt.cli.measure import measure
        from ray_ckpt.storage import open_store

        rates = measure(open_store(url, storage_options=parse_storage_options(storage_option)))
    known = {name: rate for name, rate in given.items() if rate is not None}
    if known:
        rates = replace(rates, **known, origin=f"{', '.join(known)} as given; else {rates.origin}")
    return rates


def _print(title: str, axes: dict[str, int], rates: Rates, found: Outlook) -> None:
    mesh = " x ".join(f"{name} {n}" for name, n in axes.items())
    rows = [
        ("state", f"{size(found.nbytes)} in {found.tensors} tensors"),
        ("mesh", f"{mesh}, {found.devices} devices on {found.hosts} hosts"),
        ("writers a host", _between(found.writers_a_host)),
        ("files", f"{found.shards} data shards and the index of {size(found.index_nbytes)}"),
        ("pieces of tensors in slices", found.slices),
        ("bytes a host writes", _between(found.nbytes_a_host, size)),
        ("snapshot memory a host", size(found.snapshot_nbytes_a_host)),
        ("bytes a host reads at a restore", _between(found.read_nbytes_a_host, size)),
        ("training waits", f"{found.blocked_s:.2f} s"),
        ("committed after", f"{found.commit_s:.1f} s"),
        ("restored after", f"{found.restore_s:.1f} s"),
    ]
    print_table(title, ("a save", "as planned"), rows)
    note(
        f"rates a host: snapshot {size(int(rates.snapshot))}/s, write {size(int(rates.write))}/s,"
        f" read {size(int(rates.read))}/s ({rates.origin})"
    )
    for names, what in (
        (found.unsharded, "whole along a dimension that the axes do not divide"),
        (found.not_tf_readable, "in slices of a dtype that plain TensorFlow cannot read"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            note(f"{what}: {', '.join(names[:_SHOWN])}{more}")


def _between(pair: tuple[int, int], text: Callable[[int], str] = str) -> str:
    least, most = map(text, pair)
    return least if least == most else f"{least} to {most}"
