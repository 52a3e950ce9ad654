"""Reads tokenizer.json, the format of the `tokenizers` library."""

from __future__ import annotations

import base64
import json
import re

from tokenizers import Tokenizer

from mtj_loader.errors import FormatError
from mtj_loader.formats import strict_json
from mtj_loader.formats.file_names import MAX_TOKENIZER_BYTES
from mtj_loader.formats.sentencepiece import check_charsmap
from mtj_loader.generation.tokenizer_files import File, backend_errors
from mtj_loader.storage.base import read_small

# The library decodes escapes. Those in a key are decoded first; a charsmap with one is rejected.
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')
_ESCAPED_LETTER = re.compile(rb"\\u00(5[fF]|6[1-9a-fA-F]|7[0-9aA])")


def read_tokenizer_json(file: File) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
      FormatError: the file is damaged.
    """
    data = read_small(file, MAX_TOKENIZER_BYTES)
    _check_charsmaps(data, file)
    with backend_errors("not a tokenizer", file=file):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()  # a prompt that is too long is rejected later, not truncated
    return tokenizer


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer splits texts into bytes, as Llama 3's."""
    steps = (tokenizer.pre_tokenizer, tokenizer.decoder)
    return any(step is not None and b"ByteLevel" in step.__getstate__() for step in steps)


def _check_charsmaps(data: bytes, file: File) -> None:
    """Checks every charsmap before the library allocates memory for it."""
    if _ESCAPED_LETTER.search(data):
        data = json.dumps(strict_json.parse(data, file=str(file))).encode()
    for charsmap in _CHARSMAP.findall(data):
        try:
            check_charsmap(base64.b64decode(charsmap, validate=True))
        except ValueError as error:
            key = "precompiled_charsmap"
            raise FormatError("not a tokenizer", file=file, key=key, found=error) from error
