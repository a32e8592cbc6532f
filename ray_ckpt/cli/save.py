"""``ray-ckpt save``."""

from __future__ import annotations

from typing import Annotated

import typer

from ray_ckpt.cli.options import Json, Url
from ray_ckpt.cli.output import print_json, stdout
from ray_ckpt.storage import locate

Reason = Annotated[str, typer.Option("--reason", help="Why, for the log and the metrics.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the commit.")]
Address = Annotated[
    str | None,
    typer.Option("--address", help="The Ray cluster's, as ray.init takes it; default: RAY_ADDRESS, or here."),
]


def save(
    url: Url,
    reason: Reason = "ray-ckpt save",
    timeout: Timeout = 600.0,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Ask the job that saves to this directory for a save, from where its Ray cluster can be reached, and wait."""
    # Only this subcommand needs Ray, whose import takes longer than all the others run.
    from ray_ckpt.coordinator import request_save

    step = request_save(url, reason, timeout, address)
    if as_json:
        print_json({"url": locate(url).url, "step": step})
    else:
        stdout().print(f"step {step} is saved and committed", markup=False)
