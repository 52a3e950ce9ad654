"""GBNF: which texts a grammar stands for, and errors that say where it is wrong."""

from __future__ import annotations

import json
import re

import pytest

from mtj_loader.errors import GrammarError
from mtj_loader.grammar.gbnf import parse_gbnf
from mtj_loader.grammar.to_lark import write_lark
from tests.support.grammars import accepts, compile_gbnf, walk

# GBNF, an equal regular expression, texts that match and texts that do not.
CASES = {
    "choice": ('root ::= "yes" | "no"', r"yes|no", ["yes", "no"], ["", "ye", "yesno", " yes"]),
    "longest first": ('root ::= "a" "bc" | "ab" "d"', r"abc|abd", ["abc", "abd"], ["ab", "abdc"]),
    "greedy": (
        'root ::= word "x" tail\nword ::= [a-z]+\ntail ::= [x-z]*',
        r"[a-z]+x[x-z]*",
        ["ax", "abcxx", "xx", "xxyz"],
        ["x", "abc", "Ax"],
    ),
    "repetitions": (
        'root ::= "ab"* "c"+ "d"? "e"{2} "f"{1,} "g"{0,2}',
        r"(ab)*c+d?e{2}f{1,}g{0,2}",
        ["ceef", "ababccdeeffgg"],
        ["abbceef", "cef", "ceefggg"],
    ),
    "spaces in counts": ('root ::= "a"{ 1 , 2 } "b"{\t2 }', r"a{1,2}b{2}", ["abb", "aabb"], ["ab"]),
    "groups": (
        'root ::= ("a" | ("b" "c"))+ (\n  "d" # comment\n  | "e"\n)',
        r"(a|bc)+[de]",
        ["ad", "bcae"],
        ["d", "bd", "adc"],
    ),
    "escapes": (
        r'root ::= "\"\\\n\t\r\x41\u00e9\U0001F600" [\]\[\\\-a]',
        '"\\\\\n\t\rAé\U0001f600[\\]\\[\\\\\\-a]',
        ['"\\\n\t\rAé\U0001f600]', '"\\\n\t\rAé\U0001f600-'],
        ['"\\\n\t\rAé\U0001f600b'],
    ),
    "sets": (
        "root ::= [a-c_-] [^a-c\\n]+",
        r"[a-c_\-][^a-c\n]+",
        ["ad", "-é", "_\t-", "a日本\U0001f600"],
        ["da", "a", "ad\n", "aa"],
    ),
    "any character": ("root ::= . . ", r"(?s:..)", ["\n\n", "é日", "\U0001f600a"], ["a", "abc"]),
    "empty": ('root ::= ( | "a") "" b\nb ::= | "b" |', r"a?b?", ["", "a", "ab", "b"], ["ba"]),
    "comments and lines": (
        '# first\r\n\r\nroot ::= # after\r\n  item-1 | # more\r\n  "b"\r\n\r\nitem-1 ::= "a"# end',
        r"a|b",
        ["a", "b"],
        ["ab"],
    ),
    "tail recursion": (
        'root ::= ws "x" ws\nws ::= ([ \\t\\n] ws)?',
        r"[ \t\n]*x[ \t\n]*",
        ["x", " \n x\t"],
        ["", " "],
    ),
    "nested marks": ('root ::= ("a"{2})* "b"+?', r"((a{2})*b+)|(aa)*", ["", "aab", "bb"], ["ab"]),
    "endless choices": (
        'root ::= "a" | "b" x | "c" (x | "d") x* | endless "e"\nx ::= "x" x\nendless ::= endless',
        r"a|cd",
        ["a", "cd"],
        ["b", "bx", "c", "e"],
    ),
    "dates": (  # as in llama.cpp's examples of lists
        'root ::= ("- " date "\\n")+\ndate ::= [0-9]{4} "-" ("0" [1-9] | "1" [0-2])',
        r"(- [0-9]{4}-(0[1-9]|1[0-2])\n)+",
        ["- 2024-01\n", "- 0000-12\n- 1999-09\n"],
        ["- 2024-13\n", "- 2024-01", ""],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_grammar_stands_for_its_texts(name: str) -> None:
    text, pattern, matching, others = CASES[name]
    grammar = compile_gbnf(text)
    for seed in range(15):
        output = walk(grammar, seed)
        if output.complete:
            assert re.fullmatch(pattern, output.text), output
    assert {sample: accepts(grammar, sample) for sample in matching} == dict.fromkeys(
        matching, True
    )
    assert {sample: accepts(grammar, sample) for sample in others} == dict.fromkeys(others, False)


ARITHMETIC = """
root  ::= (expr "=" ws term "\\n")+
expr  ::= term ([-+*/] ws term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \\t]*
"""


def strip_expression(text: str) -> str:
    """Rewrites innermost expressions to `1` until nothing changes; an own check of ARITHMETIC."""
    text = re.sub(r"[ \t]*([=()+*/\-\n])[ \t]*", r"\1", text)
    text = re.sub(r"\b([a-z][a-z0-9_]*|[0-9]+)[ \t]*", "1", text)
    before = None
    while text != before:
        before, text = text, re.sub(r"\(1([-+*/]1)*\)", "1", text)
    return text


def test_a_recursive_grammar() -> None:
    grammar = compile_gbnf(ARITHMETIC)
    complete = 0
    for seed in range(60):
        output = walk(grammar, seed, max_tokens=60)
        if output.complete:
            complete += 1
            assert re.fullmatch(r"(1([-+*/]1)*=1\n)+", strip_expression(output.text)), output
    assert complete > 0
    for good in ["a=1\n", "((a1 + 2)*b) - x = (y)\n", "1=1\n2=2\n"]:
        assert accepts(grammar, good)
    for bad in ["a=1", "(a=1\n", "1 2=1\n", "a=b=c\n", "=\n"]:
        assert not accepts(grammar, bad)


JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [1-9] [0-9]?)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


def test_json_as_a_grammar() -> None:
    grammar, complete = compile_gbnf(JSON), 0
    for seed in range(30):
        output = walk(grammar, seed, max_tokens=80)
        if output.complete:
            complete += 1
            assert isinstance(json.loads(output.text), dict)
    assert complete > 2
    good = ['{"a":[1,-2.5e3 ,"\\u00e9\\n",null], "é": {}}', "{ }\n  "]
    assert [accepts(grammar, text) for text in good] == [True, True]
    bad = ['{"a":01}', "[]", '{"a" 1}', '{"a":"\n"}', "{"]
    assert not any(accepts(grammar, text) for text in bad)


def test_the_characters_of_strings_are_read_as_runs() -> None:
    # Masks of a large vocabulary are a hundred times slower without.
    strings = write_lark(parse_gbnf(JSON)).count("\\x{e000}-\\x{10ffff}]+/")
    assert strings == 1


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ("", "no rule named root", None),
        ('start ::= "a"', "no rule named root", None),
        ('root ::= "a" b', "no rule named 'b'", "line 1, column 14"),
        ('root ::= "a"\nroot ::= "b"', "defined twice", "line 2, column 1"),
        ('root ::= "a', "without an end", "line 1, column 10"),
        ("root ::= [a-", "without an end", "line 1, column 10"),
        ('root ::= ("a"', "group without an end", "line 1, column 10"),
        ('root ::= "a")', "unexpected character", "line 1, column 13"),
        ('root ::= "a"\n | "b"', "expected the name of a rule", "line 2, column 2"),
        ("root ::= * ", "unexpected character", "line 1, column 10"),
        ('root = "a"', "expected ::=", "line 1, column 6"),
        (r'root ::= "\q"', "expected an escape", "line 1, column 12"),
        (r'root ::= "\x4"', "expected an escape", "line 1, column 12"),
        (r'root ::= "\ud83d"', "U+D83D is no character", "line 1"),
        (r'root ::= "\U00110000"', "U+110000 is no character", "line 1"),
        ('root ::= "\ud83d"', "U+D83D is no character", "line 1"),
        ("root ::= []", "a set without characters", "line 1, column 10"),
        (r"root ::= [^\x00-\U0010ffff]", "a set without characters", "line 1, column 10"),
        ("root ::= [z-a]", "wrong order", "line 1, column 10"),
        ('root ::= "a"{2,1}', "wrong order", "line 1, column 13"),
        ('root ::= "a"{,1}', "expected a number", "line 1, column 14"),
        ('root ::= "a"{1', "expected }", "the end, line 1"),
        ("root ::= <[1000]>", "tokens such as <[1000]>", "line 1, column 10"),
        ("root ::= !<think>", "tokens such as <[1000]>", "line 1, column 10"),
        ('root ::= "a"{2001}', "more than 2,000 repetitions", "line 1"),
        ('root ::= "a"{' + "9" * 5000 + "}", "more than 2,000 repetitions", "line 1"),
        ('root ::= "a"****', "more than 3 repetitions of one", "line 1"),
        ("root ::= " + "(" * 26, "more than 25 nested groups", "line 1"),
        ("root ::= .\n" + "".join(f"r{n} ::= .\n" for n in range(1000)), "more than 1,000", "line"),
        ("root ::= " + " " * 70_000, "too long", "70,009"),
        ('root ::= "a" root', "no text can match", None),
    ],
)
def test_errors_say_what_and_where(text: str, what: str, found: str | None) -> None:
    with pytest.raises(GrammarError) as error:
        compile_gbnf(text)
    assert what in error.value.what
    assert found is None or found in str(error.value.found)


def test_unused_rules_cost_nothing() -> None:
    text = 'root ::= "a"\n' + "".join(f"r{n} ::= .{{2000}}\n" for n in range(900))
    assert accepts(compile_gbnf(text), "a")


def test_parsing_is_linear_in_the_text() -> None:
    rules = parse_gbnf("root ::= " + " | ".join(['"a"'] * 10_000))
    assert len(rules["root"].options) == 10_000
