"""GPT-2's byte-level BPE tokenizer from vocab.json and merges.txt.

The rules are those of transformers' GPT2Tokenizer and GPTNeoXTokenizer. They differ in one point:
GPT-NeoX first normalizes the text to Unicode form C.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mtj_loader.errors import FormatError
from mtj_loader.formats import strict_json
from mtj_loader.storage.base import StoredFile

CLASSES = ("GPT2Tokenizer", "GPTNeoXTokenizer")

_END_OF_TEXT = "<|endoftext|>"  # both classes' default for bos_token, eos_token and unk_token
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
_SETTINGS = "tokenizer_config.json or special_tokens_map.json"
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_MAX_ID = 2**32 - 1  # the library's ids are unsigned 32-bit integers


def build(
    vocab: Path | StoredFile, merges: Path | StoredFile, kind: str, settings: Mapping[str, Any]
) -> Tokenizer:
    """Builds the tokenizer.

    Args:
      vocab: vocab.json: token → id.
      merges: merges.txt: two tokens per line, in merge order.
      kind: transformers' class, one of `CLASSES`; any other is treated as GPT-2's.
      settings: special_tokens_map.json updated by tokenizer_config.json.

    Raises:
      FormatError: a file is damaged, or the files do not match.
    """
    tokenizer = Tokenizer(_model(vocab, merges))
    if kind == "GPTNeoXTokenizer":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space(settings))
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, settings)
    _add_bos(tokenizer, settings)
    return tokenizer


def prefix_space(settings: Mapping[str, Any]) -> bool:
    """Whether a space is inserted before a text that begins without one."""
    return settings.get("add_prefix_space") is True


def _model(vocab: Path | StoredFile, merges: Path | StoredFile) -> models.BPE:
    try:
        return models.BPE(vocab=_read_vocab(vocab), merges=_read_merges(merges))
    except FormatError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise FormatError(
            "merges.txt does not match vocab.json", file=merges, found=error
        ) from error


def _read_vocab(path: Path | StoredFile) -> dict[str, int]:
    vocab: dict[str, Any] = strict_json.parse_object(path.read_bytes(), file=str(path))
    token_of: dict[int, str] = {}
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number <= _MAX_ID:
            raise FormatError("not a token id", file=path, key=token, found=repr(number))
        if number in token_of:
            found = f"{token_of[number]!r} and {token!r}"
            raise FormatError(f"two tokens have the id {number}", file=path, found=found)
        token_of[number] = token
    return vocab


def _read_merges(path: Path | StoredFile) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", file=path, found=f"byte {error.start}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            where = f"line {number}: {line[:60]!r}"  # only the beginning: the file is untrusted
            raise FormatError("not a merge", file=path, expected="two tokens", found=where)
        merges.append((parts[0], parts[1]))
    return merges


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Adds the tokens that are never split."""
    for number, value in _numbered_tokens(settings):
        token = _added_token(value, "added_tokens_decoder")
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != number:
            what = "an added token does not get its specified id"
            key = f"added_tokens_decoder.{number}"
            raise FormatError(what, file=_SETTINGS, key=key, expected=number, found=found)
    tokenizer.add_special_tokens(_named_tokens(settings))
    if tokenizer.token_to_id(_END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([_END_OF_TEXT])


def _numbered_tokens(settings: Mapping[str, Any]) -> list[tuple[int, object]]:
    """`added_tokens_decoder` by id, the order in which the library assigns ids."""
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
        key, expected = "added_tokens_decoder", "an object whose keys are ids"
        raise FormatError("not added tokens", file=_SETTINGS, key=key, expected=expected)
    return sorted(((int(key), value) for key, value in entries.items()), key=lambda item: item[0])


def _named_tokens(settings: Mapping[str, Any]) -> list[AddedToken]:
    named = [(key, settings[key]) for key in _NAMED if settings.get(key)]
    key = "additional_special_tokens"
    more = settings.get(key) or []
    if not isinstance(more, list):
        raise FormatError("not a list of tokens", file=_SETTINGS, key=key, found=repr(more))
    named += [(key, value) for value in more]
    return [_added_token(value, key) for key, value in named]


def _added_token(value: object, key: str) -> AddedToken:
    """Reads a token: its text, or an object with `content` and flags."""
    fields = {"content": value, "special": True} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise FormatError("not a token", file=_SETTINGS, key=key, found=repr(value))
    flags = {name: bool(fields[name]) for name in _FLAGS if name in fields}
    return AddedToken(fields["content"], **flags)


def _add_bos(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    if settings.get("add_bos_token") is not True:
        return
    bos = _added_token(settings.get("bos_token") or _END_OF_TEXT, "bos_token").content
    number = tokenizer.token_to_id(bos)
    if number is None:
        what = "the beginning-of-text token is not in the vocabulary"
        raise FormatError(what, file=_SETTINGS, key="bos_token", found=repr(bos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, number)]
    )
