"""Untrusted regular expressions: the same matches as `re`, and never slow."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtj_loader.lora.patterns import UnsupportedPatternError, compile_pattern, matches

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
        compile_pattern(pattern)
