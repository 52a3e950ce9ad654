"""The Typer application: all commands, and `--version`."""

from __future__ import annotations

from typing import Annotated

import typer

import mtj_loader
from mtj_loader.cli.compile_command import compile
from mtj_loader.cli.convert_command import convert
from mtj_loader.cli.digests_command import digests
from mtj_loader.cli.generate_command import generate
from mtj_loader.cli.inspect_command import inspect
from mtj_loader.cli.load_command import load
from mtj_loader.cli.output import print_lines
from mtj_loader.cli.plan_command import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `exit_codes` in command.py prints errors
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (inspect, plan, load, generate, compile, convert, digests):
    app.command()(_command)


def _print_version(requested: bool) -> None:
    if requested:
        print_lines(f"mtj-loader {mtj_loader.__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Load Hugging Face checkpoints onto a JAX mesh as Mesh Transformer JAX parameters.

    Exit codes: 0 success; 2 usage error; 3 bad checkpoint, map or adapter;
    4 machine error (memory, disk, network, devices); 130 interrupted;
    141 output no longer read; 143 terminated.
    """
