"""Tokenizer files made to do harm: each is an error of ours, within bounds, or works."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import pytest
import tokenizers

from mtj_loader.errors import FormatError
from mtj_loader.generation import tokenizer_json
from mtj_loader.generation.tokenizer import Tokenizer, load_tokenizer
from mtj_loader.storage.base import StoredFile
from mtj_loader.storage.local import LocalStorage

BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


def load(folder: Path, **parts: object):
    """Loads a tokenizer.json with these parts."""
    empty = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    content = {"version": "1.0", "added_tokens": [], "model": BPE, **dict.fromkeys(empty), **parts}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return load_tokenizer({"tokenizer.json": path})


def precompiled(charsmap: bytes | str | None) -> dict:
    if isinstance(charsmap, bytes):
        charsmap = base64.b64encode(charsmap).decode()
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


HUGE = struct.pack("<I", 0xFFFFFFF0) + b"ab"  # eight characters of base64, for 8.6 GB


@pytest.mark.parametrize("charsmap", [HUGE, b"", b"\x05\0\0\0abcde", struct.pack("<I", 8) + b"abc"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_library_does_not_see_a_charsmap_with_wrong_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charsmap: bytes, nested: bool
):
    monkeypatch.setattr(tokenizer_json, "Tokenizer", None)  # calling it would be another error
    normalizer: dict = precompiled(charsmap)
    if nested:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, normalizer]}
    with pytest.raises(FormatError, match=r"(?s)not a tokenizer.*precompiled_charsmap") as caught:
        load(tmp_path, normalizer=normalizer)
    assert caught.value.file == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("plain", "escaped"),
    [("precompiled_charsmap", r"precompiled\u005Fch\u0061rsmap"), ("8P", r"\u0038P"), ("/", r"\/")],
)
def test_escapes_do_not_hide_a_charsmap(tmp_path: Path, plain: str, escaped: str):
    path = tmp_path / "tokenizer.json"
    text = json.dumps({"normalizer": precompiled(HUGE)})
    assert plain in text
    path.write_text(text.replace(plain, escaped))
    with pytest.raises(FormatError, match=r"(?s)not a tokenizer.*key: precompiled_charsmap"):
        load_tokenizer({"tokenizer.json": path})


@pytest.mark.parametrize("charsmap", [None, "?", struct.pack("<II", 4, 0) + b"\xff\0"])
def test_panics_at_load_and_encode_become_errors(tmp_path: Path, charsmap: str | bytes | None):
    with pytest.raises(FormatError, match=r"not a tokenizer|fails for this text"):
        load(tmp_path, normalizer=precompiled(charsmap)).encode("abc")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "?",
            "continuing_subword_prefix": "#",
        },
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7},
        {"type": "Unigram", "vocab": [], "unk_id": None},
        {**BPE, "unk_token": "?"},
        {**BPE, "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    ],
)
def test_models_without_their_tokens(tmp_path: Path, model: dict):
    with pytest.raises(FormatError, match=r"not a tokenizer|fails for this text"):
        load(tmp_path, model=model).encode("z")


class Backend:
    """A backend whose methods fail as the library's Rust code does."""

    class PanicException(BaseException):
        pass

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def encode(self, text: str):
        raise self.error

    def decode(self, ids: list[int], **_: object):
        raise self.error


def test_panics_at_decode_become_errors_and_ctrl_c_does_not():
    def failing(error: BaseException) -> Tokenizer:
        return Tokenizer(Backend(error))  # pyright: ignore[reportArgumentType]

    with pytest.raises(FormatError, match=r"(?s)fails to decode.*PanicException: index"):
        failing(Backend.PanicException("index")).decode([0])
    with pytest.raises(FormatError, match=r"(?s)fails for this text.*PanicException"):
        failing(Backend.PanicException()).encode("a")
    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error):
            failing(error()).encode("a")


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("tokenizer.json", 100),
        ("tokenizer_config.json", 12),
        ("special_tokens_map.json", 12),
        ("added_tokens.json", 12),
        ("vocab.json", 30),
        ("merges.txt", 30),
    ],
)
def test_files_that_are_too_large_are_not_read(tmp_path: Path, name: str, megabytes: int):
    contents = {"vocab.json": '{"a": 0}', "merges.txt": "", "tokenizer_config.json": "{}"}
    files = {file: tmp_path / file for file in {*contents, name}}
    for file, path in files.items():
        path.write_text(contents.get(file, ""))
    with files[name].open("r+b") as large:
        large.truncate(megabytes * 1_000_000 + 1)  # a hole: it needs no disk
    if name != "tokenizer.json":
        files.pop("tokenizer.json", None)
    with pytest.raises(FormatError, match=rf"(?s)too large.*{megabytes},000,001") as caught:
        load_tokenizer(files, "gptj")
    assert caught.value.file == str(files[name])


def test_the_number_of_merges_is_limited(tmp_path: Path):
    files = {name: tmp_path / name for name in ("vocab.json", "merges.txt")}
    files["vocab.json"].write_text('{"a": 0, "b": 1, "ab": 2}')
    files["merges.txt"].write_text("a b\n" * 2_000_001)
    with pytest.raises(FormatError, match=r"(?s)too many merges.*2,000,000.*2,000,001 lines"):
        load_tokenizer(files, "gptj")


@pytest.mark.parametrize("stored", [False, True])
def test_a_tokenizer_model_may_not_be_large(tmp_path: Path, stored: bool):
    path = tmp_path / "tokenizer.model"
    path.touch()
    with path.open("r+b") as large:
        large.truncate(20_000_001)
    file = StoredFile(LocalStorage(tmp_path), path.name) if stored else path
    with pytest.raises(FormatError, match="too large"):
        load_tokenizer({path.name: file}, "llama", "LlamaTokenizer")


def test_a_real_charsmap_is_accepted(tmp_path: Path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    trie = struct.pack("<256I", *[0] * 256)
    backend.normalizer = tokenizers.normalizers.Precompiled(
        struct.pack("<I", len(trie)) + trie + b"\0"
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    tokenizer = load_tokenizer({path.name: path})
    assert tokenizer is not None
    assert tokenizer.encode("a") == [0]
