"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtj_loader.errors import UsageError
from mtj_loader.generation.row_output import StopMatch, find_stop_string, read_strings


def test_stop_may_be_a_string_or_a_list():
    assert read_strings("stop", None) == read_strings("stop", []) == ()
    assert read_strings("stop", "\n") == ("\n",)
    assert read_strings("stop", ["a", "b"]) == ("a", "b")


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], [None]])
def test_invalid_stop_strings_are_rejected(stop: object):
    with pytest.raises(UsageError, match=r"(?s)not a string for stop.*at least one character"):
        read_strings("stop", stop)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", [], StopMatch("abc", "", stopped=False)),
        ("abXYc", ["XY"], StopMatch("ab", "", stopped=True)),
        ("abX", ["XY"], StopMatch("ab", "X", stopped=False)),
        ("abX", ["XYZ", "bXQ"], StopMatch("a", "bX", stopped=False)),  # the longer overlap
        ("aXaXb", ["XaXc"], StopMatch("aXaXb", "", stopped=False)),
        ("aXaX", ["XaXc"], StopMatch("a", "XaX", stopped=False)),
        ("", ["X"], StopMatch("", "", stopped=False)),
        ("X", ["X"], StopMatch("", "", stopped=True)),
        ("abcd", ["bcd", "c"], StopMatch("ab", "", stopped=True)),  # "c" ends first
        ("abc", ["bc", "c"], StopMatch("a", "", stopped=True)),  # both end here: the longer one
        ("aYbX", ["X", "Y"], StopMatch("a", "", stopped=True)),
    ],
)
def test_scan(text: str, stops: list[str], expected: StopMatch):
    assert find_stop_string(text, stops) == expected


def read_in_pieces(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    released, held = "", ""
    for piece in pieces:
        found = find_stop_string(held + piece, stops)
        released, held = released + found.text, found.held
        if found.stopped:
            return released, True
    return released + held, False


@given(
    st.lists(st.text("ab", max_size=5), max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_result_does_not_depend_on_how_the_text_is_split(pieces: list[str], stops: list[str]):
    """The reference reads one character at a time and checks the end of the text so far."""
    text, expected, stopped = "".join(pieces), "".join(pieces), False
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            expected, stopped = text[: end - max(map(len, found))], True
            break
    assert read_in_pieces(pieces, stops) == (expected, stopped)
    assert read_in_pieces(list(text), stops) == (expected, stopped)
