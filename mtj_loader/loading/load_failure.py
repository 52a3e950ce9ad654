"""How a load fails: in the words of this package, and with its memory given back."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mtj_loader.display import show_bytes
from mtj_loader.errors import MachineError, MemoryLimitError
from mtj_loader.loading.free_memory import available

_NO_THREAD = "can't start new thread"  # all that Python says


@contextmanager
def clean_failure() -> Iterator[None]:
    """For functions that hold memory by the gigabyte, as a decorator.

    Notebooks and debuggers keep the last error, and with it the local variables of every function
    that it passed through. Those that have ended lose them here.

    Raises:
      MemoryLimitError: for any MemoryError; says what was needed and what was there.
      MachineError: the system refused a thread.
    """
    try:
        with _our_words():
            yield
    except BaseException as error:
        _forget_variables(error)
        raise


@contextmanager
def clean_load_failure() -> Iterator[None]:
    """As `clean_failure`, for functions that hand memory to devices."""
    try:
        with clean_failure():
            yield
    except BaseException:
        gc.collect()  # JAX lets go of memory that it adopted when Python collects
        raise


@contextmanager
def _our_words() -> Iterator[None]:
    try:
        yield
    except MemoryLimitError:
        raise
    except MemoryError as error:
        raise out_of_memory(error) from error
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        hint = "ulimit -u says how many there may be"
        raise MachineError("the system refuses another thread", hint=hint) from error


def out_of_memory(error: MemoryError) -> MemoryLimitError:
    """What was needed, as far as it is known, and what there is."""
    bounds = min(available(), key=lambda found: found[1], default=None)
    return MemoryLimitError(
        "out of memory on the host",
        expected=str(error) or None,  # numpy and `allocate` say how much
        found=None if bounds is None else f"{show_bytes(bounds[1])} within {bounds[0]}",
        hint="a smaller host_memory, more hosts, or a higher limit",
    )


def _forget_variables(error: BaseException | None) -> None:
    """Of the functions that have ended, along the chain of errors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
