"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import mtj_loader
from mtj_loader.cli.convert_command import convert
from mtj_loader.cli.digests_command import digests
from mtj_loader.cli.generate_command import generate
from mtj_loader.cli.inspect_command import inspect
from mtj_loader.cli.load_command import load
from mtj_loader.cli.plan_command import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # commands say themselves what went wrong
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (inspect, plan, load, generate, convert, digests):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mtj-loader {mtj_loader.__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Hugging Face checkpoints onto JAX device meshes, as Mesh Transformer JAX's parameters.

    Exit codes: 0 done, 2 wrong usage, 3 checkpoint or map, 4 machine, 130 interrupted
    (143 by SIGTERM).
    """
