"""Tokenizer files, token ids, and decoding one token at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mtj_loader.errors import FormatError, PromptError
from mtj_loader.generation.row_output import TextStream
from mtj_loader.generation.tokenizer import Tokenizer, load_tokenizer

FIXTURE = Path(__file__).parents[1] / "data" / "shakespeare-neox"
SETTINGS = json.loads((FIXTURE / "tokenizer_config.json").read_text())
MODEL = json.loads((FIXTURE / "tokenizer.json").read_text())["model"]
TEXT = "Hi, é e\u0301<|endoftext|> x"
# The ids of TEXT in transformers. A composed "é" is 128 103; " e" and an accent are 330 137 224.
PLAIN = [40, 73, 12, 221, 128, 103, 330, 137, 224, 0, 221, 88]
COMPOSED = [40, 73, 12, 221, 128, 103, 221, 128, 103, 0, 221, 88]


def write(folder: Path, **contents: object) -> dict[str, Path]:
    """Writes files; in names, the last `_` stands for `.`; values that are no text become JSON."""
    files = {}
    for name, content in contents.items():
        stem, _, suffix = name.rpartition("_")
        path = files[f"{stem}.{suffix}"] = folder / f"{stem}.{suffix}"
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return files


def merges() -> str:
    return "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MODEL["merges"])


def load(files: dict[str, Path], model_type: str = "gptj") -> Tokenizer:
    tokenizer = load_tokenizer(files, model_type)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def fixture_tokenizer() -> Tokenizer:
    return load({path.name: path for path in FIXTURE.iterdir()}, "gpt_neox")


def test_tokenizer_json(fixture_tokenizer: Tokenizer):
    assert fixture_tokenizer.encode(TEXT) == PLAIN
    assert fixture_tokenizer.decode(PLAIN) == "Hi, é e\u0301 x"  # the end-of-text token has no text


def test_without_enough_files_there_is_no_tokenizer(tmp_path: Path):
    assert load_tokenizer({}) is None
    assert load_tokenizer(write(tmp_path, tokenizer_config_json={}, vocab_json={"a": 0})) is None


@pytest.mark.parametrize(
    ("settings", "model_type", "expected"),
    [
        ({}, "gpt_neox", COMPOSED),
        ({}, "gptj", PLAIN),
        ({}, "opt", PLAIN),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, "llama", COMPOSED),
        ({"tokenizer_class": "GPT2Tokenizer"}, "gpt_neox", PLAIN),
        ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, "bloom", [0, *PLAIN]),
        ({"add_prefix_space": True}, "gpt_neox", [438, *COMPOSED[1:]]),
        ({"add_bos_token": True, "eos_token": "!"}, "gptj", [0, *PLAIN]),
        ({"eos_token": {"content": "Hi", "lstrip": False}}, "gpt_neo", None),
    ],
)
def test_vocab_and_merges(tmp_path: Path, settings: dict, model_type: str, expected: list[int]):
    """The ids are those of transformers' AutoTokenizer with the same files."""
    files = write(
        tmp_path,
        vocab_json=MODEL["vocab"],
        merges_txt=merges(),
        tokenizer_config_json=settings,
        special_tokens_map_json={"bos_token": "<|endoftext|>"},
    )
    tokenizer = load(files, model_type)
    if expected is None:
        assert tokenizer.encode("Hi,") == [3003, 12]  # a new token, after the 3003 in the file
        assert tokenizer.decode([3003, 12]) == ","
    else:
        assert tokenizer.encode(TEXT) == expected


def test_special_tokens_map_is_read_too(tmp_path: Path):
    files = {"vocab_json": MODEL["vocab"], "merges_txt": merges()}
    special = {"eos_token": "Hi", "bos_token": "!"}
    settings = {"add_bos_token": True, "bos_token": '"'}  # the other file wins
    written = write(
        tmp_path, **files, special_tokens_map_json=special, tokenizer_config_json=settings
    )
    assert load(written).encode("Hi,") == [1, 3003, 12]


@pytest.mark.parametrize("name", ["GPT2TokenizerFast", "GPTNeoXTokenizer"])
def test_prefix_space_of_tokenizer_config_wins_over_tokenizer_json(tmp_path: Path, name: str):
    raw = json.loads((FIXTURE / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    settings = {"tokenizer_class": name}
    files = write(tmp_path, tokenizer_json=raw, tokenizer_config_json=settings)
    assert load(files).encode("Hi") == [40, 73]
    files = write(tmp_path, tokenizer_config_json=settings | {"add_prefix_space": True})
    files["tokenizer.json"] = FIXTURE / "tokenizer.json"
    assert load(files).encode("Hi") == [438, 73]
    files = write(tmp_path, tokenizer_json=raw, tokenizer_config_json={"add_prefix_space": False})
    assert load(files, "llama").encode("Hi") == [
        438,
        73,
    ]  # other classes use tokenizer.json unchanged


def test_truncation_and_padding_of_tokenizer_json_are_off(tmp_path: Path):
    backend = tokenizers.Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=4)
    files = write(tmp_path, tokenizer_json=backend.to_str())
    assert load(files).encode("Hi,") == [40, 73, 12]
    assert load(files).encode("Hi") == [40, 73]


def test_added_tokens_get_the_ids_in_the_file(tmp_path: Path):
    names = {"vocab_json": MODEL["vocab"], "merges_txt": merges()}
    added = {"3004": {"content": "<b>", "special": True}, "3003": {"content": "   "}}
    more = {"added_tokens_decoder": added, "additional_special_tokens": ["<b>"]}
    tokenizer = load(write(tmp_path, **names, tokenizer_config_json=more))
    assert tokenizer.encode("<b>   ") == [3004, 3003]
    assert tokenizer.decode([3004, 3003]) == "   "
    added["3006"] = {"content": "<c>"}
    with pytest.raises(FormatError, match="does not get its specified id") as caught:
        load(write(tmp_path, **names, tokenizer_config_json={"added_tokens_decoder": added}))
    assert (caught.value.expected, caught.value.found) == (3006, 3005)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n", b"[" * 100_000],
)
def test_damaged_tokenizer_json(tmp_path: Path, content: bytes):
    with pytest.raises(FormatError, match="not a tokenizer") as caught:
        load(write(tmp_path, tokenizer_json=content))
    assert caught.value.file == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab_json", "{", "not valid JSON"),
        ("vocab_json", "[]", "not a JSON object"),
        ("vocab_json", '{"a": 0, "a": 1}', "(?s)duplicate key.*key: a"),
        (
            "vocab_json",
            '{"a": 0, "b": 0, "c": 1, "bc": 2}',
            "(?s)two tokens.* id 0.*'a' and",
        ),
        ("vocab_json", '{"a": 0, "b": "1"}', '(?s)not a token id.*key: b.*"1"'),
        ("vocab_json", '{"a": -1}', "(?s)not a token id.*-1"),
        ("vocab_json", '{"a": true}', "(?s)not a token id.*true"),
        ("vocab_json", '{"a": 4294967296}', "not a token id"),
        ("merges_txt", "b c d\n", "(?s)not a merge.*two tokens.*line 1: 'b c d'"),
        ("merges_txt", "#version: 0.2\nb c\nb\n", "(?s)not a merge.*line 3: 'b'"),
        (
            "merges_txt",
            "b z\n",
            "(?s)vocab.json lacks a token.*no 'z' for the merge of 'b' and 'z'",
        ),
        ("merges_txt", b"\xff", "not UTF-8"),
        ("tokenizer_config_json", '{"bos_token": 3}', "(?s)not a token.*bos_token.*3"),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"x": "a"}}', "not added tokens"),
        ("tokenizer_config_json", '{"added_tokens_decoder": [1]}', "not added tokens"),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"0": {}}}', "not a token"),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"3": "a", "03": "b"}}', "the same id"),
        ("tokenizer_config_json", '{"additional_special_tokens": [7]}', "not a token"),
        ("tokenizer_config_json", '{"additional_special_tokens": 7}', "not a list of tokens"),
        ("tokenizer_config_json", '{"added_tokens_decoder": {"9": "a"}}', "its specified id"),
        (
            "tokenizer_config_json",
            '{"added_tokens_decoder": {"1%s": "a"}}' % ("0" * 5_000),
            "not added tokens",
        ),
        ("tokenizer_config_json", '{"add_bos_token": 1}', "(?s)not a bool.*add_bos_token.*1"),
        ("tokenizer_config_json", '{"legacy": "false"}', "(?s)not a bool.*legacy.*false"),
        ("special_tokens_map_json", "null", "not a JSON object"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str | bytes, message: str):
    good = {"vocab_json": {"a": 0, "b": 1, "c": 2, "bc": 3}, "merges_txt": "b c\n"}
    assert load(write(tmp_path, **good)).encode("abc") == [0, 3]
    with pytest.raises(FormatError, match=message):
        load(write(tmp_path, **(good | {name: content})))


def test_blank_lines_and_carriage_returns_in_merges(tmp_path: Path):
    vocab = {"a": 0, "b": 1, "ab": 2}
    assert load(write(tmp_path, vocab_json=vocab, merges_txt="\r\na b\r\n\n")).encode("ab") == [2]


def test_a_lone_surrogate_is_rejected(fixture_tokenizer: Tokenizer):
    with pytest.raises(PromptError, match=r"(?s)not valid Unicode.*\\ud800"):
        fixture_tokenizer.encode("a\ud800")


def in_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_is_returned_with_its_last_byte(fixture_tokenizer: Tokenizer):
    ids = fixture_tokenizer.encode("😀a你")
    assert len(ids) == 8
    assert in_pieces(fixture_tokenizer, ids) == ["", "", "", "😀", "a", "", "", "你", ""]


def test_an_incomplete_character_is_returned_at_the_end(fixture_tokenizer: Tokenizer):
    ids = fixture_tokenizer.encode("a你")[:-1]
    assert in_pieces(fixture_tokenizer, ids) == ["a", "", "", "\ufffd"]
    ids = [*ids, *fixture_tokenizer.encode("b")]
    assert in_pieces(fixture_tokenizer, ids) == ["a", "", "", "\ufffdb", ""]


@given(st.lists(st.integers(0, 3010) | st.integers(90, 270), max_size=80))
def test_pieces_of_any_ids_add_up_to_the_text(ids: list[int]):
    """Ids 90 to 270 are mostly single bytes of invalid UTF-8; ids over 3002 have no text."""
    tokenizer = load({"tokenizer.json": FIXTURE / "tokenizer.json"})
    pieces = in_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@given(st.text(max_size=60))
def test_pieces_of_any_text_are_final(text: str):
    tokenizer = load({"tokenizer.json": FIXTURE / "tokenizer.json"})
    ids = tokenizer.encode(text.replace("\ufffd", ""))
    given_out = ""
    for piece, upto in zip(in_pieces(tokenizer, ids), range(1, len(ids) + 1), strict=False):
        given_out += piece
        assert given_out == tokenizer.decode(ids[:upto]).rstrip("\ufffd")


def sentencepiece_tokenizer() -> Tokenizer:
    """With the bytes of 你 as ids 0 to 2; 5 is special."""
    names = ["<0xE4>", "<0xBD>", "<0xA0>", "▁a", "b", "<s>"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def test_byte_tokens_of_sentencepiece_are_decoded_as_a_run():
    """The decoder reads a whole run of bytes: one invalid byte also changes the earlier ones."""
    tokenizer = sentencepiece_tokenizer()
    assert in_pieces(tokenizer, [3, 0, 1, 2, 4]) == [" a", "", "", "", "你b", ""]
    assert in_pieces(tokenizer, [0, 1, 2, 0]) == ["", "", "", "", tokenizer.decode([0, 1, 2, 0])]


@pytest.mark.parametrize("skipped", [5, 9])
def test_a_special_token_does_not_end_a_run_of_byte_tokens(skipped: int):
    """Nor an id outside the vocabulary: the decoder does not see them."""
    tokenizer = sentencepiece_tokenizer()
    ids = [3, 0, 1, 2, skipped, 0]
    assert tokenizer.decode(ids) == " a" + 4 * "\ufffd"
    assert in_pieces(tokenizer, ids) == [" a", "", "", "", "", "", 4 * "\ufffd"]
    assert in_pieces(tokenizer, [3, 0, skipped, 1, 2, 4])[-2:] == ["你b", ""]


@given(st.lists(st.sampled_from([[0, 1, 2], [0], [3], [4], [5], [9]]), max_size=30))
def test_pieces_of_any_byte_and_special_tokens_add_up_to_the_text(parts: list[list[int]]):
    tokenizer = sentencepiece_tokenizer()
    ids = [token for part in parts for token in part]
    assert "".join(in_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_decoding_a_long_text_takes_linear_time(fixture_tokenizer: Tokenizer):
    class Counting:
        decoded = 0

        def decode(self, ids: list[int]) -> str:
            self.decoded += len(ids)
            return fixture_tokenizer.decode(ids)

        is_byte, is_skipped = fixture_tokenizer.is_byte, fixture_tokenizer.is_skipped

    ids = fixture_tokenizer.encode("To be, or not to be. " * 100)
    counting = Counting()
    in_pieces(counting, ids)  # pyright: ignore[reportArgumentType]
    assert counting.decoded < 20 * len(ids)
