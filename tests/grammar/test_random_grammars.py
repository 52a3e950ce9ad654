"""Random grammars accept exactly the texts that an enumeration of their rules finds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import llguidance
import pytest

from mtj_loader.errors import GrammarError
from mtj_loader.grammar.gbnf import parse_gbnf
from mtj_loader.grammar.syntax_tree import (
    Characters,
    Choice,
    Node,
    Reference,
    Repetition,
    Rules,
    Sequence,
)
from mtj_loader.grammar.to_lark import write_lark

ALPHABET, LENGTH = "abc(", 4
BYTES = llguidance.LLTokenizer("byte", slices=[])
LIMITS = llguidance.LLParserLimits(verbose_errors=False, step_max_items=10_000_000)
ATOMS = ['"a"', '"b"', '"c"', '"ab"', "[ab]", "[^a]", "[ab]*", "[bc]+", "[^c]*", "s", "t"]


def make_grammar(chooser: random.Random) -> str:
    def node(depth: int) -> str:
        kind = chooser.random()
        if depth == 0 or kind < 0.3:
            return chooser.choice(ATOMS)
        if kind < 0.75:
            return f"({node(depth - 1)} {chooser.choice(['|', ''])} {node(depth - 1)})"
        return f"({node(depth - 1)}){chooser.choice(['*', '+', '?', '{0,2}', '{2,}'])}"

    root = f'"(" root ")" | {node(2)} | s t root "!"'
    return f'root ::= {root}\ns ::= {node(2)}\nt ::= "(" t ")" | {node(2)}\n'


def texts_of(rules: Rules) -> set[str]:
    """All texts of `root` of at most `LENGTH` characters, from the rules' definition."""
    known: dict[str, set[str]] = {name: set() for name in rules}
    while True:
        found = {name: texts_of_node(node, known) for name, node in rules.items()}
        if found == known:
            return found["root"]
        known = found


def texts_of_node(node: Node, known: dict[str, set[str]]) -> set[str]:
    match node:
        case Characters(ranges):
            return {c for c in ALPHABET if any(a <= ord(c) <= b for a, b in ranges)}
        case Reference(name):
            return known[name]
        case Choice(options):
            return set().union(*(texts_of_node(option, known) for option in options))
        case Sequence(items):
            texts = {""}
            for item in items:
                texts = joined(texts, texts_of_node(item, known))
            return texts
        case Repetition(item, least, most):
            one, texts = texts_of_node(item, known), {""}
            result = texts if least == 0 else set()
            for count in range(1, (least + LENGTH if most is None else most) + 1):
                texts = joined(texts, one)
                result = result | texts if count >= least else result
            return result


def joined(left: set[str], right: set[str]) -> set[str]:
    return {a + b for a, b in product(left, right) if len(a + b) <= LENGTH}


def accepted(matcher: llguidance.LLMatcher, text: str = "") -> Iterator[str]:
    if matcher.is_accepting():
        yield text
    for char in ALPHABET if len(text) < LENGTH else "":
        following = matcher.deep_copy()
        if following.try_consume_tokens([ord(char)]) == 1:
            yield from accepted(following, text + char)


@pytest.mark.parametrize("part", range(4))
def test_random_grammars_accept_their_texts(part: int) -> None:
    chooser, with_runs = random.Random(part), 0
    for number in range(500):
        text = make_grammar(chooser)
        rules = parse_gbnf(text)
        try:
            lark = write_lark(rules)
        except GrammarError:
            continue  # no text
        if number > 30 and "]+/" not in lark:
            continue  # runs are seldom, and need the test most
        with_runs += "]+/" in lark
        matcher = llguidance.LLMatcher(BYTES, lark, log_level=0, limits=LIMITS)
        assert set(accepted(matcher)) == texts_of(rules), f"{text}\n{lark}"
    assert with_runs > 3
