"""How loads and conversions fail: with errors of this package, and without keeping parameters."""

from __future__ import annotations

import gc
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mtj_loader.display import show_bytes
from mtj_loader.errors import MachineError, MemoryLimitError
from mtj_loader.loading.process_memory import available

if TYPE_CHECKING:
    import jax  # conversions run without it

_NO_THREAD = "can't start new thread"  # Python's message; the exception is a plain RuntimeError


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raises our errors where memory or threads run out; for `with` and as a decorator.

    Raises:
      MemoryLimitError: for any MemoryError; says how much was needed and available.
      MachineError: the system could not start a thread.
    """
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


@contextmanager
def release_on_failure(params: MutableMapping[str, dict[str, jax.Array]]) -> Iterator[None]:
    """Empties `params` if the body fails.

    Notebooks and debuggers keep the last error, and with it the local variables of every function
    in its traceback. The parameters must not stay on the devices for so long.
    """
    try:
        yield
    except BaseException:
        params.clear()
        gc.collect()  # JAX releases adopted memory during garbage collection
        raise


def out_of_memory(error: MemoryError) -> MemoryLimitError:
    """An error that says how much memory was needed, if known, and how much is available."""
    tightest = min(available(), key=lambda limit: limit[1], default=None)
    return MemoryLimitError(
        "out of memory on the host",
        expected=str(error) or None,  # numpy and `allocate` give the size
        found=None if tightest is None else f"{show_bytes(tightest[1])} within {tightest[0]}",
        hint="use a smaller host_memory, more hosts, or a higher limit",
    )
