"""The commands, put together, and the process around them."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

import mtj_loader
from mtj_loader.cli.convert import convert
from mtj_loader.cli.generate import generate
from mtj_loader.cli.inspect import inspect
from mtj_loader.cli.load import load
from mtj_loader.cli.plan import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # commands say themselves what went wrong
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (inspect, plan, load, generate, convert):
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

    Exit codes: 0 done, 2 wrong usage, 3 checkpoint or map, 4 machine, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` are those of the process by default."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name or a text is no reason to fail
    app(args=arguments, prog_name="mtj-loader")


def _terminate(number: int, _: FrameType | None) -> None:
    """Ends like Ctrl-C does, through every `finally`: no thread and no half-made file stays."""
    raise SystemExit(128 + number)
