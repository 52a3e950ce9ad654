"""The entry point: signals, output streams, memory limits and exit codes of the process."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from mtj_loader.cli import signals, supervise
from mtj_loader.errors import MachineError, MtjLoaderError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` are those of the process by default."""
    try:
        with supervise.supervise_host(arguments):
            supervise.supervise_memory_limit()
            signals.exit_on_signal()
            _run(arguments)
    except signals.Stopped as stopped:
        print(stopped.message, file=sys.stderr)
        raise
    except MtjLoaderError as error:
        _fail(error)
    except OSError as error:  # no more open files for imports, or no disk space for the output
        _fail(MachineError("the operating system reported an error", found=str(error)))
    except SystemExit as error:
        if isinstance(
            error.__context__, BrokenPipeError
        ):  # `head` closed the pipe, and rich exits with 1
            sys.exit(0)
        raise


def _run(arguments: Sequence[str] | None) -> None:
    from mtj_loader.cli.app import app  # noqa: PLC0415 -- after the signal handlers are set

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # never fail to print
    app(args=arguments, prog_name="mtj-loader")


def _fail(error: MtjLoaderError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
