"""SentencePiece's tokenizer.model, written by hand as in its protocol buffer definition."""

from __future__ import annotations

import struct

import pytest

from mtj_loader.errors import FormatError
from mtj_loader.formats.sentencepiece import ModelType, Piece, PieceType, parse_model


def field(number: int, value: int | float | bytes) -> bytes:
    """A field with an integer, a 32-bit float, or bytes."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def piece(text: str, *fields: bytes) -> bytes:
    return field(1, field(1, text.encode()) + b"".join(fields))


UNK = piece("<unk>", field(2, 0.0), field(3, 2))
PIECES = UNK + piece("▁a", field(2, -1.5)) + piece("<0x0A>", field(3, 6))
NEGATIVE = 2**64 - 1  # -1 as an int32
CHARSMAP = struct.pack("<II", 4, 0) + b"x\0"


def parse(data: bytes):
    return parse_model(data, file="tokenizer.model")


def test_all_fields():
    trainer = field(3, 2) + field(35, 1) + field(41, NEGATIVE) + field(47, b"<end>") + field(99, 5)
    model = parse(PIECES + field(2, trainer) + field(3, field(2, CHARSMAP)) + field(4, b"?"))
    assert model.pieces == (
        Piece("<unk>", 0.0, PieceType.UNKNOWN),
        Piece("▁a", -1.5, PieceType.NORMAL),
        Piece("<0x0A>", 0.0, PieceType.BYTE),
    )
    assert (model.model_type, model.byte_fallback, model.unk_id) == (ModelType.BPE, True, 0)
    assert model.special_tokens == {"unk_token": "<unk>", "eos_token": "<end>"}
    assert model.charsmap == CHARSMAP


def test_defaults():
    model = parse(PIECES)
    assert (model.model_type, model.byte_fallback, model.charsmap) == (
        ModelType.UNIGRAM,
        False,
        b"",
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert model.special_tokens == names


def test_a_message_in_two_parts_is_merged_and_the_last_value_counts():
    model = parse(field(2, field(3, 1) + field(35, 1)) + PIECES + field(2, field(3, 2)))
    assert (model.model_type, model.byte_fallback) == (ModelType.BPE, True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a SentencePiece model"),
        (PIECES[:-1], "bytes where"),
        (PIECES + b"\x80", "an incomplete number"),
        (PIECES + b"\x80" * 10 + b"\x01", "an incomplete number"),
        (PIECES + b"\x0b", "wire type 3"),
        (PIECES + b"\x12\xff\xff\xff\xff\x0f", "a field of 4,294,967,295 bytes where 0 are left"),
        (PIECES + piece("▁a"), "piece 3 has the text '▁a' of another piece"),
        (PIECES + piece(""), "piece 3 has 0 characters"),
        (PIECES + field(1, b""), "piece 3 has 0 characters"),
        (PIECES + piece("a" * 257), "piece 3 has 257 characters"),
        (PIECES + field(1, field(1, b"\xff")), "utf-8"),
        (PIECES + piece("b", field(2, float("nan"))), "piece 3 has the score nan"),
        (PIECES + piece("b", field(3, 7)), "7 is not a valid PieceType"),
        (PIECES + field(2, field(3, 5)), "5 is not a valid ModelType"),
        (PIECES + field(2, field(40, 3)), "the id 3 of 3 pieces"),
        (PIECES + field(3, field(2, b"abc")), "no trie"),
        (PIECES + field(3, field(2, struct.pack("<I", 5) + b"12345")), "no trie"),
        (PIECES + field(3, field(2, b"\xf0\xff\xff\xff....")), "4,294,967,280 bytes where 4"),
    ],
)
def test_damaged(data: bytes, message: str):
    with pytest.raises(FormatError, match=message) as caught:
        parse(data)
    assert (caught.value.what, caught.value.file) == (
        "not a SentencePiece model",
        "tokenizer.model",
    )
