"""Tokenizes text with the `tokenizers` library, from the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from mtj_loader.errors import FormatError, PromptError
from mtj_loader.formats import strict_json
from mtj_loader.generation import byte_level
from mtj_loader.storage.base import StoredFile

# The class that transformers uses if tokenizer_config.json names none.
_DEFAULT_CLASS = {"gpt_neox": "GPTNeoXTokenizer"}

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's spelling of a single byte


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that returns the same ids as transformers' AutoTokenizer."""

    backend: tokenizers.Tokenizer

    def __repr__(self) -> str:
        return f"<Tokenizer with {self.backend.get_vocab_size():,} tokens>"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, including the special tokens that the checkpoint adds to a prompt.

        Raises:
          PromptError: the text contains half a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = ascii(error.object[error.start])
            raise PromptError("the text is not valid Unicode", found=found) from error
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens such as end of text and padding.

        Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are skipped.
        """
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def is_byte(self, token: int) -> bool:
        """Whether the token is a single byte of SentencePiece, such as `<0xE4>`."""
        name = self.backend.id_to_token(token)
        return name is not None and _BYTE_TOKEN.fullmatch(name) is not None


def load_tokenizer(
    files: Mapping[str, Path | StoredFile], model_type: str | None = None
) -> Tokenizer | None:
    """Reads a checkpoint's tokenizer: tokenizer.json, or else vocab.json with merges.txt.

    Args:
      files: by file name; tokenizer_config.json and special_tokens_map.json are read too if
        present.
      model_type: of config.json; chooses between GPT-2's and GPT-NeoX's rules if
        tokenizer_config.json does not.

    Returns:
      None if the files contain no tokenizer; token ids still work then.

    Raises:
      FormatError: a file is damaged.
    """
    settings = _optional_json(files, "tokenizer_config.json")
    name = settings.get("tokenizer_class") or _DEFAULT_CLASS.get(model_type or "", "")
    kind = str(name).removesuffix("Fast")
    if "tokenizer.json" in files:
        return Tokenizer(_from_json(files["tokenizer.json"], kind, settings))
    if "vocab.json" in files and "merges.txt" in files:
        special = _optional_json(files, "special_tokens_map.json")
        settings = special | settings
        return Tokenizer(byte_level.build(files["vocab.json"], files["merges.txt"], kind, settings))
    return None


def _optional_json(files: Mapping[str, Path | StoredFile], name: str) -> dict[str, Any]:
    path = files.get(name)
    return strict_json.parse_object(path.read_bytes(), file=str(path)) if path else {}


def _from_json(
    path: Path | StoredFile, kind: str, settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Reads tokenizer.json; as in transformers, the class decides about the prefix space."""
    data = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing more specific
        raise FormatError("not a tokenizer", file=path, found=error) from error
    backend.no_padding()
    backend.no_truncation()  # a prompt that is too long is rejected later, not truncated
    current = backend.pre_tokenizer
    if kind in byte_level.CLASSES and isinstance(current, pre_tokenizers.ByteLevel):
        current.add_prefix_space = byte_level.prefix_space(settings)
        backend.pre_tokenizer = current
    return backend
