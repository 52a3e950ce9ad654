"""The typed reader: values of the wrong type, nested objects, unknown keys."""

from __future__ import annotations

import pytest

from mtj_loader.errors import FormatError, MapError
from mtj_loader.formats.typed_reader import TypedReader


class Strict(TypedReader):
    error_class = MapError
    null_is_absent = False


def reader(**values: object) -> TypedReader:
    return TypedReader(values, "f.json")


def test_values_of_the_right_type_are_returned() -> None:
    found = reader(a="x", b=[1, "y"], c=["y", "z"], d={"e": 3})
    assert found.text("a") == "x"
    assert found.items("b") == [1, "y"]
    assert found.names("c") == ("y", "z")
    assert found.section("d").integer("e") == 3
    assert found.all_keys == ["a", "b", "c", "d"]
    found.refuse_rest()


def test_absent_lists_and_sections_are_empty() -> None:
    found = reader()
    assert (found.items("a"), found.names("a"), found.sections("a")) == ([], (), [])
    assert found.section("a").all_keys == []


@pytest.mark.parametrize(
    ("method", "value", "expected"),
    [
        ("text", "", "a non-empty string"),
        ("text", 3, "a non-empty string"),
        ("items", "abc", "a list"),
        ("names", ["a", 3], "a list of strings"),
        ("integer", 0, "a whole number from 1 to 2147483647"),
    ],
)
def test_other_values_are_errors(method: str, value: object, expected: str) -> None:
    with pytest.raises(FormatError, match="not a legal value") as caught:
        getattr(reader(k=value), method)("k")
    assert (caught.value.file, caught.value.key) == ("f.json", "k")
    assert caught.value.expected == expected


@pytest.mark.parametrize("value", [-2.5, 2.5, True, "1"])
def test_numbers_have_two_bounds(value: object) -> None:
    assert reader(k=-2).number("k", low=-2, high=2) == -2.0
    with pytest.raises(FormatError, match="a number from -2 to 2"):
        reader(k=value).number("k", low=-2, high=2)


def test_errors_of_nested_objects_give_the_path() -> None:
    found = Strict({"a": {"b": [{"c": 1}, {"c": "x"}]}}, "m.json")
    first, second = found.section("a").sections("b")
    assert first.integer("c") == 1
    with pytest.raises(MapError) as caught:
        second.integer("c")
    assert caught.value.key == "a.b[1].c"


@pytest.mark.parametrize("values", [{"a": 3}, {"a": [3]}])
def test_a_section_must_be_an_object(values: dict) -> None:
    with pytest.raises(FormatError, match="not an object"):
        reader(**values).section("a")


def test_a_required_section_may_not_be_absent() -> None:
    with pytest.raises(FormatError, match="a required setting is missing"):
        reader().section("a", required=True)


def test_null_counts_as_absent_unless_the_class_says_otherwise() -> None:
    assert reader(a=None).integer("a", 7) == 7
    with pytest.raises(MapError, match="not a legal value"):
        Strict({"a": None}, "m.json").integer("a", 7)


def test_a_key_that_was_not_read_is_refused_with_those_that_were() -> None:
    found = reader(a=1, b=2)
    found.integer("a")
    with pytest.raises(FormatError, match="unknown key") as caught:
        found.refuse_rest()
    assert (caught.value.key, caught.value.expected, caught.value.found) == ("b", "a", "2")
