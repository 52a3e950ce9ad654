"""Sequence breakers of a request, from texts to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from mtj_loader.engine.generate_options import GenerateKeywords, read_options
from mtj_loader.engine.generator import Generator
from mtj_loader.engine.request import RunningRequest
from mtj_loader.engine.runner import Engine
from mtj_loader.errors import TokenizerMissingError, UsageError
from mtj_loader.generation.prompts import PromptRules
from tests.support.fixture_tokenizer import TOKENIZER

RULES = PromptRules(TOKENIZER.backend.get_vocab_size(), 64, TOKENIZER)
TEXTS = [TOKENIZER.decode([i]) for i in range(RULES.vocab_size)]


class _Submitted(Exception):
    """Raised in place of running the requests."""


class _Engine:
    def submit(self, requests: Sequence[RunningRequest]) -> None:
        raise _Submitted(*requests)


def breakers(rules: PromptRules = RULES, **settings: Any) -> set[int]:
    """The ids that the samplers get for a request with these settings."""
    generator = Generator(cast("Engine", _Engine()), rules, frozenset(), lambda _: ())
    params, options, _ = read_options(cast("GenerateKeywords", {"max_new_tokens": 1, **settings}))
    with pytest.raises(_Submitted) as caught:
        next(generator.start([1, 2], params, options).pieces)
    words = caught.value.args[0].settings.dry_breakers
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def containing(*texts: str) -> set[int]:
    return {i for i, token in enumerate(TEXTS) if any(text in token for text in texts)}


def test_texts_become_the_tokens_that_contain_them():
    assert breakers(dry_multiplier=1.0, dry_sequence_breakers=["\n", "?"]) == containing("\n", "?")
    assert breakers(dry_multiplier=1.0, dry_sequence_breakers="\n") == containing("\n")


def test_ids_and_an_empty_list_are_kept():
    assert breakers(dry_multiplier=1.0, dry_sequence_breakers=[3, 7]) == {3, 7}
    assert breakers(dry_multiplier=1.0, dry_sequence_breakers=[]) == set()


def test_koboldcpps_breakers_are_the_default():
    assert breakers(dry_multiplier=1.0) == containing("\n", ":", '"', "*")
    assert breakers(dry_multiplier=1.0, dry_sequence_breakers=None) == breakers(dry_multiplier=1.0)


def test_without_dry_no_texts_are_looked_up():
    assert breakers() == set()
    assert breakers(dry_sequence_breakers=["longer than any token"]) == set()


def test_without_a_tokenizer_only_ids_work():
    bare = replace(RULES, tokenizer=None)
    assert breakers(bare, dry_multiplier=1.0) == set()
    assert breakers(bare, dry_multiplier=1.0, dry_sequence_breakers=[3]) == {3}
    with pytest.raises(TokenizerMissingError, match="texts as breakers need a tokenizer"):
        breakers(bare, dry_multiplier=1.0, dry_sequence_breakers=["\n"])


def test_ids_outside_the_vocabulary_are_neither_accepted_nor_found():
    small = replace(RULES, vocab_size=300)
    assert breakers(small, dry_multiplier=1.0) == {
        i for i in containing("\n", ":", '"', "*") if i < 300
    }
    with pytest.raises(UsageError, match="outside the vocabulary"):
        breakers(small, dry_multiplier=1.0, dry_sequence_breakers=[300])
