"""Ids of DRY's sequence breakers, with a byte-level tokenizer and one of SentencePiece's kind."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from mtj_loader.errors import UsageError
from mtj_loader.sampling.breakers import (
    DEFAULT_BREAKERS,
    breaker_tokens,
    check_breakers,
    default_breaker_tokens,
    token_texts,
)
from tests.support.fixture_tokenizer import TOKENIZER

TEXTS = ["a", "\n", ".\n", ' "', "b:c", "**", " a"]


def test_tokens_that_contain_a_breaker():
    assert breaker_tokens(DEFAULT_BREAKERS, TEXTS) == (1, 2, 3, 4, 5)
    assert breaker_tokens(["\n", "\n"], TEXTS) == (1, 2)
    assert breaker_tokens([" a"], TEXTS) == (6,)
    assert breaker_tokens([], TEXTS) == ()


@pytest.mark.parametrize("breakers", [["a", "xyz"], [""], [str(i) for i in range(129)]])
def test_breakers_that_are_refused(breakers: list[str]):
    with pytest.raises(UsageError, match="breaker"):
        breaker_tokens(breakers, TEXTS)


def test_default_breakers_are_left_out_where_no_token_contains_them():
    assert default_breaker_tokens(TEXTS) == breaker_tokens(DEFAULT_BREAKERS, TEXTS)
    assert default_breaker_tokens(TEXTS[:4]) == (1, 2, 3)
    assert default_breaker_tokens(["a"]) == ()


def test_breakers_are_texts_or_ids():
    for breakers in (None, "\n", [], ["\n", ":"], (1, 2)):
        check_breakers(breakers)
    for breakers in (1, [1, ":"], {"\n": 1}, [1.5], b"x", [None]):
        with pytest.raises(UsageError, match="not sequence breakers"):
            check_breakers(breakers)


def test_texts_of_byte_level_tokens():
    texts = token_texts(TOKENIZER.backend)
    assert len(texts) == TOKENIZER.backend.get_vocab_size()
    ids = TOKENIZER.encode("To be:\nor not")
    assert [texts[i] for i in ids if "\n" in texts[i]]
    assert token_texts(TOKENIZER.backend, ids) == [texts[i] for i in ids]
    assert "".join(texts[i] for i in ids) == "To be:\nor not"


def test_texts_of_sentencepiece_tokens_keep_their_spaces():
    vocabulary = {"<unk>": 0, "▁one": 1, "two": 2, "<0x0A>": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    assert token_texts(tokenizer) == ["<unk>", " one", "two", "\n"]
