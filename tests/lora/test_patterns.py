"""Untrusted regular expressions: the same matches as `re`, and never slow."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtj_loader.lora.pattern_table import PatternTable
from mtj_loader.lora.patterns import (
    MAX_WORK,
    Matcher,
    UnsupportedPatternError,
    Work,
    compile_pattern,
)

ATOMS = st.sampled_from(
    ["a", "b", "_", ".", r"\.", r"\d", r"\W", "[ab]", "[^a]", "[]a-]", "^", "$"]
)
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{2,}", "{0}", "*?", "+?", "??", "{1,2}?"]


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = inner.map("({})".format) | inner.map("(?:{})".format)
    return (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map("|".join).map("({})".format)
        | st.tuples(group, st.sampled_from(REPEATS)).map("".join)
    )


@given(st.recursive(ATOMS, larger, max_leaves=8), st.text("ab._1", max_size=6))
def test_matches_equal_those_of_re(pattern: str, text: str):
    try:
        expected = re.fullmatch(pattern, text)
    except re.error:
        assume(False)
    assert matches(pattern, text) == bool(expected)


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern matches the whole text."""
    work = Work()
    return Matcher(compile_pattern(pattern, work), work).matches(text)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "q_proj2", False),
        (r".*\.layers\.(0|1|10)\..*q_proj", "model.layers.10.attn.q_proj", True),
        (r".*\.layers\.(0|1|10)\..*q_proj", "model.layers.11.attn.q_proj", False),
        (r"(.*\.)?(dense|^wte)", "wte", True),
        (r"(.*\.)?(dense|^wte)", "h.wte", False),
        ("a{2,3}", "aaaa", False),
        ("(a*)*", "", True),
        ("", "", True),
        ("a||b", "", True),
    ],
)
def test_matches(pattern: str, text: str, expected: bool):
    assert matches(pattern, text) is expected


# Each takes `re` exponential time, or a high power of the text's length.
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+!",
        "(a*)*b",
        "(a|a)*b",
        "(a|aa)+!",
        "(.*a){20}!",
        "(x+x+)+y|(a+a+)+y",
        r"([a-z_0-9]+\.?)+!",
        "(a?){50}a{150}!",
        ".*" * 50 + "!",
        "(" * 40 + "a*" + ")*" * 40 + "!",
    ],
)
def test_no_pattern_takes_forever(pattern: str):
    assert not matches(pattern, "a" * 150)
    assert matches(pattern[:-1], "a" * 150) or pattern[-1] != "!"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "from character 2 on: ''"),
        (")", "from character 1 on"),
        ("a)(b", "from character 2 on"),
        ("*a", "from character 1 on"),
        ("a**", "from character 2 on"),
        ("a++", "from character 2 on"),  # possessive
        ("[a", "from character 1 on"),
        ("[z-a]", "bad character range"),
        ("[[a]b]", "from character 1 on"),  # `re` warns
        ("[+--a]", "from character 1 on"),
        ("[a&&b]", "from character 1 on"),
        (r"(a)\1", "from character 4 on"),
        (r"\bq", "from character 1 on"),
        ("(?i)a", "from character 1 on"),
        ("(?=a)a", "from character 1 on"),
        ("(?P<n>a)", "from character 1 on"),
        ("a{3,2}", "a maximum below the minimum"),
        ("a{4294967296}", "from character 2 on"),
        ("((a{99}){99}){99}", "too many repetitions"),
        ("(a{99}b{99}){20}" * 2, "too many repetitions"),
        ("a" * 513, "more than 512 characters"),
        ("(" * 51 + "a" + ")" * 51, "nested too deeply"),
    ],
)
def test_unsupported_patterns_are_refused_with_the_reason(pattern: str, words: str):
    with pytest.raises(UnsupportedPatternError, match=words):
        matches(pattern, "")


NAMES = st.text("ab", min_size=1, max_size=2)
MODULES = st.lists(NAMES, min_size=1, max_size=3).map(".".join)
PARTS = st.sampled_from(["a", "b", ".", r"\.", "a|b", "(", ")", "*", "^", "$"])
PATTERNS = st.lists(PARTS, max_size=5).map("".join) | MODULES


@given(st.lists(PATTERNS, max_size=4, unique=True), MODULES)
def test_the_first_match_is_that_of_peft(patterns: list[str], module: str):
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
        table = PatternTable({pattern: i for i, pattern in enumerate(patterns)})
    except (re.error, UnsupportedPatternError):
        assume(False)
    # peft/utils/other.py: get_pattern_key
    found = (i for i, p in enumerate(compiled) if re.match(rf"(.*\.)?({p.pattern})$", module))
    assert table.first_match(module, -1) == next(found, -1)


def names(count: int) -> list[str]:
    return [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.down_proj" for i in range(count)]


def test_a_pattern_for_each_of_many_modules_takes_little_work():
    """As after an initialization that chooses ranks (EVA)."""
    modules = names(2000)
    table = PatternTable({name: rank for rank, name in enumerate(modules)})
    assert [table.first_match(name, -1) for name in modules] == list(range(2000))
    assert table.work.left > MAX_WORK * 0.9


def test_a_few_patterns_for_very_many_modules_take_little_work():
    patterns = {r".*\.experts\..*\.(down|up)_proj": 1, r"layers\.[0-9]+\.mlp\..*": 2}
    table = PatternTable(patterns)
    assert {table.first_match(name, -1) for name in names(18_000)} == {1}
    assert table.work.left > MAX_WORK * 0.5


@pytest.mark.parametrize(
    "patterns",
    [
        [f"{i}[ab]{{9}}" for i in range(6_000)],  # steps
        [f"[{chr(i)}x]" for i in range(256, 6_000)],  # classes
        [f"({i}|a.*b)*c" for i in range(6_000)],  # reached positions
        [f"(a|b)*a(a|b){{{i}}}c" for i in range(20, 30)],  # a set for each end of a name
    ],
    ids=["steps", "classes", "positions", "sets"],
)
def test_patterns_that_take_too_long_are_refused(
    patterns: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mtj_loader.lora.patterns.MAX_WORK", 100_000)
    random = Random(0)
    modules = ["".join(random.choices("ab", k=200)) for _ in range(99)]

    def match_all() -> list[int]:
        table = PatternTable(dict.fromkeys(patterns, 1))
        return [table.first_match(module, 0) for module in modules]

    with pytest.raises(UnsupportedPatternError, match="the patterns take too long"):
        match_all()
