"""One output's way through a grammar: end of text, backing up, errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from mtj_loader.errors import GrammarError, UsageError
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.grammar.compile_grammar import read_grammar
from tests.support.fixture_tokenizer import TOKENIZER
from tests.support.grammars import EOS, VOCAB_SIZE, compile_gbnf, compile_schema, read_mask, walk

A, B = (TOKENIZER.encode(char)[0] for char in "ab")


def test_end_of_text_is_allowed_exactly_where_the_grammar_may_end() -> None:
    matcher = compile_gbnf('root ::= "a" "b"?').start()
    assert not read_mask(matcher)[list(EOS)].any()
    matcher.advance(A)
    assert set(np.flatnonzero(read_mask(matcher))) == {B, *EOS}
    assert not matcher.finished
    matcher.advance(B)
    assert set(np.flatnonzero(read_mask(matcher))) == EOS
    assert matcher.finished


def test_end_of_text_ends_the_output() -> None:
    matcher = compile_gbnf('root ::= "a" "b"?').start()
    matcher.advance(A)
    matcher.advance(max(EOS))
    assert matcher.finished
    assert set(np.flatnonzero(read_mask(matcher))) == EOS
    with pytest.raises(GrammarError, match="does not allow"):
        matcher.advance(B)
    matcher.rollback(1)
    assert not matcher.finished
    matcher.advance(B)


def test_an_empty_text_may_be_all_that_is_allowed() -> None:
    matcher = compile_gbnf('root ::= ""').start()
    assert matcher.finished
    assert set(np.flatnonzero(read_mask(matcher))) == EOS


def test_a_token_against_the_grammar_is_refused_and_changes_nothing() -> None:
    matcher = compile_gbnf('root ::= "a" "b"').start()
    for token in [B, min(EOS), VOCAB_SIZE - 2, VOCAB_SIZE, -1]:
        with pytest.raises(GrammarError, match="does not allow"):
            matcher.advance(token)
    matcher.advance(A)
    matcher.advance(B)
    assert matcher.finished


@pytest.mark.parametrize("seed", range(8))
def test_backing_up_equals_starting_again(seed: int) -> None:
    grammars = [
        compile_gbnf('root ::= ("a" root "b" | [c-x ]+)'),
        compile_schema({"type": "object"}),
    ]
    chooser = random.Random(seed)
    grammar = grammars[seed % 2]
    matcher, ids = grammar.start(), []
    for _ in range(40):
        allowed = np.flatnonzero(read_mask(matcher)).tolist()
        ids.append(chooser.choice(allowed))
        matcher.advance(ids[-1])
        if matcher.finished or chooser.random() < 0.3:
            count = chooser.randint(0, len(ids))
            matcher.rollback(count)
            del ids[len(ids) - count :]
        again = grammar.start()
        for token in ids:
            again.advance(token)
        assert again.finished == matcher.finished
        assert np.array_equal(read_mask(again), read_mask(matcher))


def test_backing_up_too_far_is_refused() -> None:
    matcher = compile_gbnf('root ::= "a"').start()
    with pytest.raises(ValueError, match="cannot take back 1 of 0"):
        matcher.rollback(1)


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_can_be_completed(seed: int) -> None:
    grammar = compile_gbnf(
        'root ::= "(" (root | [a-z]{1,3}) ")" | "x" dead | "é"\ndead ::= "y" dead'
    )
    chooser, matcher = random.Random(seed), grammar.start()
    for _ in range(12):
        if matcher.finished:
            break
        matcher.advance(chooser.choice(np.flatnonzero(read_mask(matcher)).tolist()))
    close = TOKENIZER.encode(")")[0]
    for _ in range(60):  # a closing parenthesis where possible
        if matcher.finished:
            break
        allowed = np.flatnonzero(read_mask(matcher)).tolist()
        matcher.advance(close if close in allowed else allowed[0])
    assert matcher.finished


def test_requests_of_one_grammar_do_not_disturb_each_other() -> None:
    grammar = compile_gbnf('root ::= "a" "b"')
    first, second = grammar.start(), grammar.start()
    first.advance(A)
    assert read_mask(second)[A]
    assert read_mask(first)[B]


@pytest.mark.parametrize("vocab_size", [TOKENIZER.backend.get_vocab_size() - 40, VOCAB_SIZE, 4096])
def test_the_vocabulary_may_have_another_size_than_the_tokenizers(vocab_size: int) -> None:
    grammar = compile_gbnf("root ::= .*", vocab_size=vocab_size)
    mask = read_mask(grammar.start(), vocab_size)
    size = TOKENIZER.backend.get_vocab_size()
    assert not mask[size : VOCAB_SIZE - 1].any()
    assert mask[1:size].sum() > 100
    walk(grammar, 0, vocab_size=vocab_size, eos={0})


def test_without_end_of_text_tokens_a_finished_grammar_allows_nothing() -> None:
    matcher = compile_gbnf('root ::= "a"', eos=()).start()
    matcher.advance(A)
    assert matcher.finished
    assert not read_mask(matcher).any()


def test_a_grammar_that_the_vocabulary_cannot_spell_is_an_error() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    backend.decoder = decoders.Fuse()
    args = {"tokenizer": Tokenizer(backend), "vocab_size": 2, "eos": ()}
    matcher = compile_gbnf('root ::= "a" "c"', **args).start()
    matcher.advance(0)
    with pytest.raises(GrammarError, match="any further"):
        read_mask(matcher, 2)
    with pytest.raises(GrammarError):  # and stays one
        matcher.advance(1)


def test_one_of_grammar_and_schema_is_needed() -> None:
    for gbnf, schema in [(None, None), ('root ::= "a"', {})]:
        with pytest.raises(UsageError, match="either a grammar or a JSON schema"):
            read_grammar(gbnf, schema, TOKENIZER, EOS, VOCAB_SIZE)
