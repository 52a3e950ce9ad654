"""What the readers of tokenizer files share: JSON, token ids, failures of `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from mtj_loader.errors import FormatError, MtjLoaderError
from mtj_loader.formats import strict_json
from mtj_loader.formats.typed_reader import format_value
from mtj_loader.storage.base import StoredFile, read_small

File = Path | StoredFile

_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
MAX_ID = 2**32 - 1  # the library's ids are unsigned 32-bit integers
_MAX_SETTINGS_BYTES = 12_000_000  # ten times Gemma 3's tokenizer_config.json


def read_json(file: File, max_bytes: int = _MAX_SETTINGS_BYTES) -> dict[str, object]:
    """Reads a file that contains a JSON object, by default one with settings.

    Raises:
      FormatError: the file has more than `max_bytes`, or does not contain an object.
    """
    return strict_json.parse_object(read_small(file, max_bytes), file=str(file))


def check_flags(config: Mapping[str, object], *, file: object) -> None:
    """Raises FormatError if a flag of tokenizer_config.json is neither a bool nor null."""
    for key in _FLAGS:
        if not isinstance(value := config.get(key), bool | None):
            found = format_value(value)
            raise FormatError("not a bool", file=file, key=key, found=found)


def check_ids(values: Mapping[str, object], *, file: object) -> Mapping[str, int]:
    """Checks that a JSON object maps tokens to their ids, and returns it.

    Raises:
      FormatError: a value is not an id.
    """
    for token, value in values.items():
        if type(value) is not int or not 0 <= value <= MAX_ID:
            raise FormatError("not a token id", file=file, key=token, found=format_value(value))
    return cast("Mapping[str, int]", values)


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
