"""How loads and conversions fail: with errors of this package, and without keeping memory."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mtj_loader.display import show_bytes
from mtj_loader.errors import MachineError, MemoryLimitError
from mtj_loader.loading.process_memory import available

_NO_THREAD = "can't start new thread"  # Python's message; the exception is a plain RuntimeError


@contextmanager
def clean_failure() -> Iterator[None]:
    """A decorator for functions that hold gigabytes of memory.

    Notebooks and debuggers keep the last error, and with it the local variables of every function
    in its traceback. This clears the variables of the functions that have ended.

    Raises:
      MemoryLimitError: for any MemoryError; says how much was needed and available.
      MachineError: the system could not start a thread.
    """
    try:
        with _translate_errors():
            yield
    except BaseException as error:
        _clear_variables(error)
        raise


@contextmanager
def clean_load_failure() -> Iterator[None]:
    """Like `clean_failure`, for functions that transfer memory to devices."""
    try:
        with clean_failure():
            yield
    except BaseException:
        gc.collect()  # JAX releases adopted memory during garbage collection
        raise


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    except MemoryLimitError:
        raise
    except MemoryError as error:
        raise out_of_memory(error) from error
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        hint = "ulimit -u shows the limit"
        raise MachineError("the system cannot start another thread", hint=hint) from error


def out_of_memory(error: MemoryError) -> MemoryLimitError:
    """An error that says how much memory was needed, if known, and how much is available."""
    tightest = min(available(), key=lambda limit: limit[1], default=None)
    return MemoryLimitError(
        "out of memory on the host",
        expected=str(error) or None,  # numpy and `allocate` give the size
        found=None if tightest is None else f"{show_bytes(tightest[1])} within {tightest[0]}",
        hint="use a smaller host_memory, more hosts, or a higher limit",
    )


def _clear_variables(error: BaseException | None) -> None:
    """Clears the variables of functions that have ended, for all errors in the chain."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
