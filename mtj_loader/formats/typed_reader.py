"""Typed access to a parsed JSON object: values of the wrong type and unknown keys are errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import ClassVar, Self, TypeGuard

from mtj_loader.errors import FormatError, MtjLoaderError

MAX_INT = 2**31 - 1  # what an int32 position or token id can hold
_MAX_SHOWN_CHARS = 80  # of a value in a message: enough to recognize it


class TypedReader:
    """Typed access to the keys of a JSON object; records which keys were read.

    An absent key takes `default`; without a default that is an error. Every method raises
    `error_class`, with the file, the key, what was expected and what was found.

    Args:
      values: the object, parsed.
      file: where it was read, for messages.
      prefix: the path of the object inside the file, for messages: "" or "rope_parameters.".
    """

    error_class: ClassVar[type[MtjLoaderError]] = FormatError
    null_is_absent: ClassVar[bool] = True

    def __init__(self, values: Mapping[str, object], file: str, prefix: str = "") -> None:
        self._values, self._file, self._prefix = values, file, prefix
        self._read: set[str] = set()

    @property
    def all_keys(self) -> list[str]:
        """All keys of the object, in the order of the file."""
        return list(self._values)

    def spelling(self, key: str) -> str:
        """The name of a key in messages; subclasses may rename keys."""
        return key

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        self._read.add(key)
        return self._values.get(key) is not None

    def raw(self, key: str, default: object = None) -> object:
        """The unchecked value, or `default` if the key is absent."""
        self._read.add(key)
        return self._values.get(key, default)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT
    ) -> int:
        """An integer from `low` to `high`; true and 2.0 are rejected."""
        expected = f"a whole number from {low} to {high}"
        value = self._value(key, default, expected)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self._bad_value(key, expected)

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float | None = None
    ) -> float:
        """A finite number from `low` to `high`; integers are accepted, true is rejected."""
        expected = f"a finite number of at least {low}"
        if high is not None:
            expected = f"a number from {low} to {high}"
        value = self._value(key, default, expected)
        if _is_number(value, low) and (high is None or value <= high):
            return float(value)
        raise self._bad_value(key, expected)

    def numbers(self, key: str, *, low: float = 0.0) -> tuple[float, ...]:
        """A list of finite numbers of at least `low`."""
        expected = f"a list of finite numbers of at least {low}"
        values = self._value(key, None, expected)
        if isinstance(values, list | tuple) and all(_is_number(v, low) for v in values):
            return tuple(map(float, values))
        raise self._bad_value(key, expected)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A bool; 0 and 1 are rejected."""
        value = self._value(key, default, "true or false")
        if isinstance(value, bool):
            return value
        raise self._bad_value(key, "true or false")

    def text(self, key: str) -> str:
        """A non-empty string."""
        value = self._value(key, None, "a non-empty string")
        if isinstance(value, str) and value:
            return value
        raise self._bad_value(key, "a non-empty string")

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """One of a closed list of names."""
        expected = "one of " + ", ".join(choices)
        value = self._value(key, default, expected)
        if isinstance(value, str) and value in choices:
            return value
        raise self._bad_value(key, expected)

    def items(self, key: str) -> list[object]:
        """A list of anything; empty if the key is absent."""
        value = self._value(key, [], "a list")
        if isinstance(value, list):
            return value
        raise self._bad_value(key, "a list")

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if the key is absent."""
        values = self.items(key)
        names = tuple(value for value in values if isinstance(value, str))
        if len(names) == len(values):
            return names
        raise self._bad_value(key, "a list of strings")

    def section(self, key: str, *, required: bool = False) -> Self:
        """The object under a key; an empty one if it is absent and not required."""
        value = self._value(key, None if required else {}, "{…}")
        return self._child(value, key)

    def sections(self, key: str) -> list[Self]:
        """A list of objects; empty if the key is absent."""
        return [self._child(item, f"{key}[{i}]") for i, item in enumerate(self.items(key))]

    def refuse_rest(self) -> None:
        """Raises an error if the object has a key that was not read."""
        for key in sorted(self._values.keys() - self._read):
            raise self.error("unknown key", key, ", ".join(sorted(self._read)))

    def error(
        self, what: str, key: str, expected: str | None = None, hint: str | None = None
    ) -> MtjLoaderError:
        """The error to raise about a key and its value."""
        return self.error_class(
            what,
            file=self._file,
            key=self._prefix + self.spelling(key),
            expected=expected,
            found=format_value(self._values.get(key)),
            hint=hint,
        )

    def _bad_value(self, key: str, expected: str) -> MtjLoaderError:
        return self.error("not a legal value", key, expected)

    def _child(self, value: object, name: str) -> Self:
        if isinstance(value, Mapping):
            return type(self)(value, self._file, f"{self._prefix}{name}.")
        found = format_value(value)
        key = self._prefix + name
        raise self.error_class(
            "not an object", file=self._file, key=key, expected="{…}", found=found
        )

    def _value(self, key: str, default: object, expected: str) -> object:
        self._read.add(key)
        value = self._values.get(key)
        absent = key not in self._values or (value is None and self.null_is_absent)
        if absent and default is None:
            raise self.error("a required setting is missing", key, expected)
        return default if absent else value


def format_value(value: object) -> str:
    """The value as JSON, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print the largest
        return f"a whole number of {value.bit_length()} bits"
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


def _is_number(value: object, low: float) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return low <= value <= sys.float_info.max  # false for NaN, and for an int beyond any float
