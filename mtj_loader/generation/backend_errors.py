"""Failures of the `tokenizers` library as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mtj_loader.errors import FormatError, MtjLoaderError


@contextmanager
def backend_errors(what: str, *, file: object = None) -> Iterator[None]:
    """Raises a FormatError for any failure of the library in the body of the `with` statement.

    The library raises plain exceptions, and for a failed assertion of its Rust code a
    PanicException, which is a BaseException and which it does not export.

    Args:
      what: the sentence of the error.
      file: the file that is at fault.
    """
    try:
        yield
    except (MtjLoaderError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise FormatError(what, file=file, found=found) from error
