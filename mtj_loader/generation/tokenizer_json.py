"""Reads tokenizer.json, the format of the `tokenizers` library."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

from tokenizers import Tokenizer

from mtj_loader.errors import FormatError
from mtj_loader.formats import strict_json
from mtj_loader.formats.file_names import MAX_TOKENIZER_BYTES
from mtj_loader.formats.sentencepiece import check_charsmap
from mtj_loader.generation.backend_errors import backend_errors
from mtj_loader.generation.byte_level import File
from mtj_loader.storage.base import read_small

# A charsmap, or an escaped letter or underscore, which its key may contain.
_MAY_HAVE_CHARSMAP = re.compile(rb"precompiled_charsmap|\\u00[567]")


def read_tokenizer_json(file: File) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
      FormatError: the file is damaged.
    """
    data = read_small(file, MAX_TOKENIZER_BYTES)
    if _MAY_HAVE_CHARSMAP.search(data):
        _check_charsmaps(strict_json.parse(data, file=str(file)), file)
    with backend_errors("not a tokenizer", file=file):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()  # a prompt that is too long is rejected later, not truncated
    return tokenizer


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer splits texts into bytes, as Llama 3's."""
    steps = (tokenizer.pre_tokenizer, tokenizer.decoder)
    return any(step is not None and b"ByteLevel" in step.__getstate__() for step in steps)


def _check_charsmaps(document: object, file: File) -> None:
    """Checks every charsmap before the library allocates memory for it."""
    for charsmap in _find(document, "precompiled_charsmap"):
        try:
            if charsmap is not None:
                check_charsmap(base64.b64decode(str(charsmap), validate=True))
        except (ValueError, binascii.Error) as error:
            key = "precompiled_charsmap"
            raise FormatError("not a tokenizer", file=file, key=key, found=error) from error


def _find(value: object, key: str) -> Iterator[object]:
    """All values of a key, at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for item in value.values():
            yield from _find(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _find(item, key)
