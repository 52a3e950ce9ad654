"""Strict JSON: what Python's parser wrongly accepts is rejected, and located."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtj_loader.errors import FormatError
from mtj_loader.formats import strict_json

MORE_DIGITS = "1" * (strict_json.MAX_DIGITS + 1)
DEEP = strict_json.MAX_DEPTH + 1

REFUSED = {
    "empty": (b"", "not valid JSON", "line 1 column 1 (character 0)"),
    "cut": (b'{"a": [1,\n 2', "not valid JSON", "line 2"),
    "comment": (b"{} // x", "not valid JSON", "character 3"),
    "single-quotes": (b"{'a': 1}", "not valid JSON", "character 1"),
    "leading-zero": (b"[01]", "not valid JSON", "character 2"),
    "raw-newline-in-string": (b'["a\nb"]', "not valid JSON", "control character"),
    "second-document": (b"{}{}", "not valid JSON", "Extra data"),
    "nul-padding": (b"{}\0\0", "not valid JSON", "Extra data"),
    "byte-order-mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "utf-16": ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8", "at byte 7"),
    "raw-surrogate": (b'"\xed\xa0\x80"', "not UTF-8", "at byte 1"),
    "half-surrogate-value": (rb'{"a": "\ud800"}', "surrogate", r"'\ud800'"),
    "half-surrogate-key": (rb'{"\uDC00": 1}', "surrogate", r"'\udc00'"),
    "duplicate": (b'{"a": 1, "a": 1}', "duplicate key", "key: a\n", "2 times"),
    "duplicate-inside": (b'{"a": [0, {"b": {"c": 1, "c": 2}}]}', "key: a[1].b.c\n"),
    "duplicate-escaped": (rb'{"a": {"b": 1, "\u0062": 2}}', "duplicate key", "key: a.b\n"),
    "duplicate-unprintable": (rb'{"\u001b": 1, "\u001b": 2}', r"key: '\x1b'"),
    "nan": (b'{"a": NaN}', "not a finite number", "key: a\n", "found: NaN"),
    "infinity": (b"[1, Infinity]", "not a finite number", "key: [1]\n", "found: Infinity"),
    "minus-infinity": (b"-Infinity", "not a finite number", "found: -Infinity"),
    "1e999": (b'{"a": {"b": 1e999}}', "not a finite number", "key: a.b\n", "found: 1e999"),
    "long-integer": (f"[{MORE_DIGITS}]", "integer is too long", "key: [0]\n", "1,001 digits"),
    "5000-digits": ('{"n": ' + "9" * 5000 + "}", "integer is too long", "5,000 digits"),
    "deep-lists": ("[" * DEEP + "]" * DEEP, "nested too deeply", "at most 64 levels"),
    "deep-objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "deep-unclosed": ("[" * 1_000_000, "nested too deeply"),
}


@pytest.mark.parametrize(("data", "words"), [(c[0], c[1:]) for c in REFUSED.values()], ids=REFUSED)
def test_rejected_with_file_and_location(data, words):
    with pytest.raises(FormatError) as caught:
        strict_json.parse(data, file="some.json")
    for word in ("file: some.json", *words):
        assert word in f"{caught.value}\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b' \t\r\n{"a": [1, -2, 3.5, "x"]}\n', {"a": [1, -2, 3.5, "x"]}),
        (b"[true, false, null]", [True, False, None]),
        (rb'"\ud83d\ude00"', "😀"),
        (rb'"\\ud800"', r"\ud800"),  # an escaped backslash, no surrogate
        ('"' + "[{" * 100 + '"', "[{" * 100),  # brackets in a string are not nesting
        (r'"\"[[[' + "[" * 100 + '"', '"[[[' + "[" * 100),
        (r'["\\", "' + "[" * 100 + '"]', ["\\", "[" * 100]),
        (r'["\\", ' + "[" * 62 + "]" * 62 + "]", None),
        ("[" * 64 + "]" * 64, None),
        ("1" * strict_json.MAX_DIGITS, int("1" * strict_json.MAX_DIGITS)),
        (b"1e308", 1e308),
    ],
)  # fmt: skip
def test_accepted(data, expected):
    value = strict_json.parse(data, file="some.json")
    assert value == (json.loads(data) if expected is None else expected)


def test_types_are_distinct():
    one, true, real, minus_zero = strict_json.parse(b"[1, true, 1.0, -0]", file="x")
    assert (type(one), type(true), type(real)) == (int, bool, float)
    assert type(minus_zero) is float
    assert math.copysign(1, minus_zero) == -1


def test_first_of_several_faults_is_reported():
    with pytest.raises(FormatError, match="finite"):
        strict_json.parse(b'{"a": NaN, "b": {"c": 1, "c": 2}}', file="x")


def test_max_bytes_counts_bytes():
    assert strict_json.parse('"é"', file="x", max_bytes=4) == "é"
    with pytest.raises(FormatError, match="at most 3 bytes") as caught:
        strict_json.parse('"é"', file="x", max_bytes=3)
    assert "found: 4 bytes" in str(caught.value)


def test_parse_object_requires_an_object():
    assert strict_json.parse_object(b'{"a": 1}', file="x") == {"a": 1}
    with pytest.raises(FormatError, match="not a JSON object") as caught:
        strict_json.parse_object(b'["a"]', file="x")
    assert "found: ['a']" in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(values, st.booleans())
def test_reads_what_python_writes(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert strict_json.parse(text.encode(), file="x") == value


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:\\u0dD8eE+-.1nul', max_size=30))
def test_only_our_error_escapes(data):
    try:
        value = strict_json.parse(data, file="x")
    except FormatError:
        return
    assert value == json.loads(data)
