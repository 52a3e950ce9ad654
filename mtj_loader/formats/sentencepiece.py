"""Reads SentencePiece's `tokenizer.model`, a protocol buffer, strictly and in bounded time.

The fields are those of sentencepiece_model.proto in google/sentencepiece; the others only matter
for training. The encoding is that of https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from mtj_loader.errors import FormatError

_MAX_PIECE_CHARS = 256  # 16 by default in training; converting a piece takes quadratic time
_MAX_VARINT_BYTES = 10  # 64 bits in groups of 7

# A tag is the number of a field and the wire type of its value.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECE, _TRAINER, _NORMALIZER = (field << 3 | _BYTES for field in (1, 2, 3))
_TEXT, _SCORE, _TYPE = 1 << 3 | _BYTES, 2 << 3 | _FIXED32, 3 << 3 | _VARINT
_MODEL_TYPE, _BYTE_FALLBACK = 3 << 3 | _VARINT, 35 << 3 | _VARINT
_CHARSMAP = 2 << 3 | _BYTES


class _SpecialToken(NamedTuple):
    """The fields of the trainer's specification for one special token, and their defaults."""

    id_tag: int
    default_id: int
    text_tag: int
    default_text: bytes


_SPECIAL = {
    "unk_token": _SpecialToken(40 << 3 | _VARINT, 0, 45 << 3 | _BYTES, b"<unk>"),
    "bos_token": _SpecialToken(41 << 3 | _VARINT, 1, 46 << 3 | _BYTES, b"<s>"),
    "eos_token": _SpecialToken(42 << 3 | _VARINT, 2, 47 << 3 | _BYTES, b"</s>"),
}
_NO_TOKEN = 1 << 63  # ids from here on are negative: the model has no such token

_Message = Mapping[int, int | bytes]  # tag → last value


class ModelType(IntEnum):
    """The algorithm of a model."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class PieceType(IntEnum):
    """What a piece stands for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One token; its id is its index."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a tokenizer.model.

    Attributes:
      pieces: by id; no two have the same text.
      model_type: the algorithm.
      byte_fallback: whether characters without a piece become byte pieces.
      unk_id: the id of the unknown token.
      special_tokens: the texts of `unk_token`, `bos_token` and `eos_token`, if the model has them.
      charsmap: a compiled normalization; empty if there is none.
    """

    pieces: tuple[Piece, ...]
    model_type: ModelType
    byte_fallback: bool
    unk_id: int
    special_tokens: Mapping[str, str]
    charsmap: bytes


def parse_model(data: bytes, *, file: str) -> SentencePieceModel:
    """Parses a tokenizer.model.

    Raises:
      FormatError: it is not a SentencePiece model, or it is damaged.
    """
    try:
        return _read_model(data)
    except ValueError as error:
        raise FormatError("not a SentencePiece model", file=file, found=error) from error


def check_charsmap(charsmap: bytes) -> None:
    """Checks the sizes in a compiled normalization: readers allocate memory for what they state.

    It has the size of a trie in bytes (4 bytes, little-endian), the trie (4 bytes per unit), and
    the texts that replace others, each with a final NUL.

    Raises:
      ValueError: it is damaged.
    """
    size_bytes = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size_bytes == 0 or size_bytes % 4:
        raise ValueError("the precompiled charsmap has no trie")
    if size_bytes > len(charsmap) - 4:
        found = f"{size_bytes:,} bytes where {len(charsmap) - 4:,} are left"
        raise ValueError(f"the precompiled charsmap states a trie of {found}")


def _read_model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    specs: dict[int, dict[int, int | bytes]] = {_TRAINER: {}, _NORMALIZER: {}}
    for tag, value in _fields(data):
        if tag == _PIECE:
            pieces.append(_read_piece(dict(_fields(_bytes(value))), len(pieces)))
        elif tag in specs:
            specs[tag].update(_fields(_bytes(value)))
    _check_texts(pieces)
    trainer = specs[_TRAINER]
    ids = {name: trainer.get(token.id_tag, token.default_id) for name, token in _SPECIAL.items()}
    texts = {n: trainer.get(token.text_tag) or token.default_text for n, token in _SPECIAL.items()}
    unk_id = _int(ids["unk_token"])
    if unk_id >= len(pieces):
        raise ValueError(f"the unknown token has the id {unk_id} of {len(pieces)} pieces")
    charsmap = _bytes(specs[_NORMALIZER].get(_CHARSMAP, b""))
    if charsmap:
        check_charsmap(charsmap)
    return SentencePieceModel(
        tuple(pieces),
        ModelType(_int(trainer.get(_MODEL_TYPE, ModelType.UNIGRAM))),
        bool(trainer.get(_BYTE_FALLBACK, 0)),
        unk_id,
        {n: _bytes(texts[n]).decode("utf-8") for n, i in ids.items() if _int(i) < _NO_TOKEN},
        charsmap,
    )


def _read_piece(message: _Message, number: int) -> Piece:
    text = _bytes(message.get(_TEXT, b"")).decode("utf-8")
    (score,) = struct.unpack("<f", _bytes(message.get(_SCORE, bytes(4))))
    if not text or len(text) > _MAX_PIECE_CHARS:
        raise ValueError(
            f"piece {number} has {len(text):,} characters, not 1 to {_MAX_PIECE_CHARS}"
        )
    if not math.isfinite(score):
        raise ValueError(f"piece {number} has the score {score}")
    return Piece(text, score, PieceType(_int(message.get(_TYPE, PieceType.NORMAL))))


def _check_texts(pieces: list[Piece]) -> None:
    if not pieces:
        raise ValueError("no pieces")
    seen: set[str] = set()
    for number, piece in enumerate(pieces):
        if piece.text in seen:
            raise ValueError(f"piece {number} has the text {piece.text!r} of another piece")
        seen.add(piece.text)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: the tag and the value of each.

    Raises:
      ValueError: the message ends early, or it is not a protocol buffer.
    """
    position, end = 0, len(data)
    while position < end:
        tag, position = _read_varint(data, position)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, position = _read_varint(data, position)
            yield tag, value
            continue
        if wire_type == _BYTES:
            length, position = _read_varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"the wire type {wire_type} at byte {position:,}")
        if length > end - position:
            raise ValueError(f"a field of {length:,} bytes where {end - position:,} are left")
        yield tag, data[position : position + length]
        position += length


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for shift, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise ValueError(f"an incomplete number at byte {position:,}")


def _int(value: int | bytes) -> int:
    assert isinstance(value, int), "the tag says so"
    return value


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes), "the tag says so"
    return value
