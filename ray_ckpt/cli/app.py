"""The command's entry: its subcommands, and every error as one line on stderr.

Exit codes: 0 success, 1 damage was found, 2 the call or the storage is wrong.
"""

from __future__ import annotations

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from ray_ckpt.cli.clean import clean
from ray_ckpt.cli.listing import ls
from ray_ckpt.cli.plan import plan
from ray_ckpt.cli.save import save
from ray_ckpt.cli.show import show
from ray_ckpt.cli.verify import verify
from ray_ckpt.errors import DamagedError, RayCkptError

EXIT_DAMAGED = 1
EXIT_ERROR = 2


class _OneLineErrors(TyperGroup):
    """Ends a subcommand that raised one of our errors with its text and an exit code, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RayCkptError as error:
            typer.secho(f"error: {' '.join(str(error).split())}", err=True, fg="red")
            raise typer.Exit(EXIT_DAMAGED if isinstance(error, DamagedError) else EXIT_ERROR) from None


app = typer.Typer(
    name="ray-ckpt",
    help="Look at, verify and clean up checkpoint directories on any fsspec URL; plan a save.",
    epilog="Exit codes: 0 success, 1 damage was found, 2 the call or the storage is wrong.",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (ls, show, verify, save, clean, plan):
    app.command()(command)


def main() -> None:
    """Run the command with the process's arguments."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
