"""Tokenizers without tokenizer.json: the ids and texts of transformers, or a refusal by name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from mtj_loader.errors import FormatError, TokenizerMissingError
from mtj_loader.formats.sentencepiece import parse_model
from mtj_loader.generation import from_sentencepiece
from mtj_loader.generation.from_sentencepiece import find_merges
from mtj_loader.generation.tokenizer import choose_class, load_tokenizer
from tests.support.tokenizers import CASES, FOLDER, TEXTS, load_case, vocabulary, write_json


@pytest.mark.parametrize("name", CASES)
def test_ids_and_texts_are_those_of_transformers(name: str, tmp_path: Path):
    case, tokenizer = CASES[name], load_case(name, tmp_path)
    for text, ids, decoded in zip(TEXTS, case["ids"], case["decoded"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == decoded, text


def test_qwen2_does_not_split_newlines_as_gpt2_does(tmp_path: Path):
    """Two newlines are one token of Qwen2, as 271 in the published vocabulary."""
    qwen2, gpt2 = load_case("qwen2", tmp_path), load_case("gpt2", tmp_path)
    (newlines,) = qwen2.encode("a\n\nb")[1:-1]
    assert gpt2.encode("a\n\nb")[1:-1] != [newlines]


@pytest.mark.parametrize(
    ("model_type", "named", "expected"),
    [
        ("llama", "LlamaTokenizerFast", "LlamaTokenizer"),
        ("llama", None, "TokenizersBackend"),
        ("llama", "PreTrainedTokenizerFast", "TokenizersBackend"),
        ("llama", "LLaMATokenizer", "LlamaTokenizer"),
        ("mistral", "LlamaTokenizer", "TokenizersBackend"),
        ("qwen2", "GPT2Tokenizer", "Qwen2Tokenizer"),
        ("qwen3", "GPT2Tokenizer", "GPT2Tokenizer"),
        ("qwen3", None, "Qwen2Tokenizer"),
        ("gptj", "CodeGenTokenizer", "CodeGenTokenizer"),
        ("gptj", {"odd": 1}, "GPT2Tokenizer"),
        ("xglm", None, "XGLMTokenizer"),
        (None, None, "TokenizersBackend"),
    ],
)
def test_the_class_is_chosen_as_by_auto_tokenizer(model_type, named, expected: str):
    assert choose_class(model_type, named) == expected


@pytest.mark.parametrize(
    ("name", "model_type", "class_name"),
    [
        ("byte_level", "llama", "LlamaTokenizer"),
        ("byte_level", "bloom", None),
        ("byte_level", "gptj", "RobertaTokenizer"),
        ("bpe", "gptj", None),
        ("bpe", "llama", "T5Tokenizer"),
    ],
)
def test_other_classes_are_refused_by_name(name: str, model_type: str, class_name):
    with pytest.raises(TokenizerMissingError, match="no rules for the other files") as caught:
        load_tokenizer(vocabulary(name), model_type, class_name)
    assert str(caught.value.found).startswith(choose_class(model_type, class_name))
    assert all(file in str(caught.value.found) for file in vocabulary(name))


def test_a_model_of_another_type_is_refused_by_name():
    with pytest.raises(TokenizerMissingError, match=r"(?s)LlamaTokenizer.*BPE.*UNIGRAM"):
        load_tokenizer(vocabulary("unigram"), "llama", "LlamaTokenizer")


def test_empty_names_of_the_first_conversions_of_llama_are_not_set(tmp_path: Path):
    names = {"bos_token": "", "eos_token": "", "unk_token": "", "add_bos_token": True}
    files = write_json(tmp_path, {"tokenizer_config": names}) | vocabulary("bpe")
    tokenizer = load_tokenizer(files, "llama", "LLaMATokenizer")
    assert tokenizer is not None
    assert tokenizer.encode(TEXTS[6]) == CASES["llama_fast_bos"]["ids"][6]


@pytest.mark.parametrize("text", ["$A", "$B", "b:1", ":", "$0"])
def test_a_token_to_add_may_contain_template_syntax(tmp_path: Path, text: str):
    config = {"bos_token": text, "eos_token": text, "add_bos_token": True, "add_eos_token": True}
    files = write_json(tmp_path, {"tokenizer_config": config}) | vocabulary("bpe")
    tokenizer = load_tokenizer(files, "llama", "LlamaTokenizer")
    plain = load_tokenizer(vocabulary("bpe"), "llama", "LlamaTokenizer")
    assert tokenizer is not None
    assert plain is not None
    added = tokenizer.backend.token_to_id(text)
    assert tokenizer.encode(TEXTS[6]) == [added, *plain.encode(TEXTS[6]), added]


def test_config_json_may_name_the_class(tmp_path: Path):
    tokenizer = load_tokenizer(vocabulary("bpe"), "llama", "LlamaTokenizer")
    assert tokenizer is not None
    assert [tokenizer.encode(text) for text in TEXTS] == CASES["llama"]["ids"]


def test_a_new_token_must_not_get_the_id_of_another(tmp_path: Path):
    files = write_json(tmp_path, {"vocab": {"a": 0, "b": 1, "ab": 3}})
    files["merges.txt"] = tmp_path / "merges.txt"
    files["merges.txt"].write_text("a b\n")
    with pytest.raises(FormatError, match=r"(?s)gaps.*id 3 for '<\|endoftext\|>' and 'ab'"):
        load_tokenizer(files, "gptj")


def test_merges_are_ordered_by_the_id_of_the_result_and_then_by_the_first_part():
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 5, "ab": 4, "abc": 6}
    assert find_merges(vocab, file="x") == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


def test_the_number_of_merges_of_a_tokenizer_model_is_limited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(from_sentencepiece, "_MAX_MERGES", 100)
    with pytest.raises(FormatError, match=r"(?s)too many merges.*tokenizer\.model.*at most 100"):
        load_tokenizer(vocabulary("bpe"), "llama", "LlamaTokenizer")


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_a_damaged_tokenizer_model_is_an_error_or_a_model(name: str):
    data = (FOLDER / name / "tokenizer.model").read_bytes()
    refused = 0
    for position in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        for damaged in (data[:position], bytes(flipped)):
            with suppress(FormatError):
                parse_model(damaged, file="tokenizer.model")
                continue
            refused += 1
    assert refused > len(data) / 97
