"""The process around the commands: its signals, its streams, its limits, its exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from mtj_loader.cli import limits, signals, supervise
from mtj_loader.errors import MachineError, MtjLoaderError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` are those of the process by default."""
    try:
        with supervise.supervised(arguments):
            limits.guard()
            signals.watch()
            _run(arguments)
    except signals.Stopped as stopped:
        print(stopped.word, file=sys.stderr)
        raise
    except MtjLoaderError as error:
        _fail(error)
    except OSError as error:  # no more files for what is imported, or no room for the help
        _fail(MachineError("the system refuses", found=str(error)))
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich says 1 where `head` had enough
            sys.exit(0)
        raise


def _run(arguments: Sequence[str] | None) -> None:
    from mtj_loader.cli.app import app  # noqa: PLC0415 -- when signals are watched

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name or a text is no reason to fail
    app(args=arguments, prog_name="mtj-loader")


def _fail(error: MtjLoaderError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
