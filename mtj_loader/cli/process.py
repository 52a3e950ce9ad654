"""The entry point: signals, output streams, memory limits and exit codes of the process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mtj_loader.cli import memory_limit, signals, supervise
from mtj_loader.cli.streams import CLOSED_PIPE, discard_stdout, prepare_streams, print_to_stderr
from mtj_loader.errors import MachineError, MtjLoaderError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` are those of the process by default."""
    try:
        prepare_streams()
        with supervise.supervise_host(arguments):
            memory_limit.supervise_memory_limit()
            signals.exit_on_signal()
            _run(arguments)
    except signals.Stopped as stopped:
        print_to_stderr(stopped.message)
        raise
    except MtjLoaderError as error:
        _fail(error)
    except OSError as error:  # no more open files for imports, or no disk space for `--help`
        discard_stdout()
        _fail(MachineError("the operating system reported an error", found=str(error)))
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # of rich, which exits with 1
            discard_stdout()
            sys.exit(CLOSED_PIPE)
        raise


def _run(arguments: Sequence[str] | None) -> None:
    from mtj_loader.cli.app import app  # noqa: PLC0415 -- after the signal handlers are set

    app(args=arguments, prog_name="mtj-loader")


def _fail(error: MtjLoaderError) -> None:
    print_to_stderr(f"error: {error}")
    sys.exit(error.exit_code)
