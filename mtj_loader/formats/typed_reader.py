"""Typed access to a parsed JSON object: values of the wrong type and unknown keys are errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self, TypeGuard, TypeVar

from mtj_loader.errors import FormatError, MtjLoaderError

MAX_INT = 2**31 - 1  # what an int32 position or token id can hold
_MAX_SHOWN_CHARS = 80  # of a value or a key in a message: enough to recognize it

_T = TypeVar("_T")


class TypedReader:
    """Typed access to the keys of a JSON object; records which keys were read.

    An absent key takes `default`; without a default that is an error. Every method raises
    `error_class`, with the file, the key, what was expected and what was found. With a list of
    `problems`, it adds the error to the list instead, and returns some legal value.

    Args:
      values: the object, parsed.
      file: where it was read, for messages.
      prefix: the path of the object inside the file, for messages: "" or "rope_parameters.".
      problems: collects errors; None raises them.
    """

    error_class: ClassVar[type[MtjLoaderError]] = FormatError
    null_is_absent: ClassVar[bool] = True

    def __init__(
        self,
        values: Mapping[str, object],
        file: str,
        prefix: str = "",
        problems: list[Any] | None = None,
    ) -> None:
        self._values, self._file, self._prefix = values, file, prefix
        self._problems = problems
        self._read: set[str] = set()
        self._refused: set[str] = set()  # paths of keys, shared by all sections of a file

    @property
    def all_keys(self) -> list[str]:
        """All keys of the object, in the order of the file."""
        return list(self._values)

    @property
    def has_problems(self) -> bool:
        """Whether any key of the file was refused."""
        return bool(self._refused)

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
        self,
        key: str,
        default: int | None = None,
        *,
        low: int = 1,
        high: int = MAX_INT,
        given: Collection[str] = (),
    ) -> int:
        """An integer from `low` to `high`; true and 2.0 are rejected.

        `given` are the paths of keys that the bounds follow from; see `refuse`.
        """
        value = self._value(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        expected = f"a whole number from {low} to {high}"
        stand_in = low if default is None else max(low, min(default, high))
        return self._reject(key, expected, stand_in, default, given)

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float | None = None
    ) -> float:
        """A finite number from `low` to `high`; integers are accepted, true is rejected."""
        value = self._value(key, default)
        if _is_number(value, low) and (high is None or value <= high):
            return float(value)
        expected = f"a finite number of at least {low}"
        if high is not None:
            expected = f"a number from {low} to {high}"
        return self._reject(key, expected, max(low, 1.0) if default is None else default, default)

    def numbers(self, key: str, *, low: float = 0.0) -> tuple[float, ...]:
        """A list of finite numbers of at least `low`."""
        values = self._value(key)
        if isinstance(values, list | tuple) and all(_is_number(v, low) for v in values):
            return tuple(map(float, values))
        return self._reject(key, f"a list of finite numbers of at least {low}", ())

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A bool; 0 and 1 are rejected."""
        value = self._value(key, default)
        if isinstance(value, bool):
            return value
        return self._reject(key, "true or false", bool(default), default)

    def text(self, key: str) -> str:
        """A non-empty string."""
        value = self._value(key)
        if isinstance(value, str) and value:
            return value
        return self._reject(key, "a non-empty string", "?")

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """One of a closed list of names."""
        value = self._value(key, default)
        if isinstance(value, str) and value in choices:
            return value
        stand_in = next(iter(choices)) if default is None else default
        return self._reject(key, "one of " + ", ".join(choices), stand_in, default)

    def items(self, key: str) -> list[object]:
        """A list of anything; empty if the key is absent."""
        value = self._value(key, [])
        return value if isinstance(value, list) else self._reject(key, "a list", [])

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if the key is absent."""
        values = self.items(key)
        names = tuple(value for value in values if isinstance(value, str))
        if len(names) == len(values):
            return names
        return self._reject(key, "a list of strings", ())

    def section(self, key: str, *, required: bool = False) -> Self:
        """The object under a key; an empty one if it is absent and not required."""
        absent = self._is_absent(key)
        if absent and required:
            self._reject(key, "{…}", None)
        return self._child({} if absent else self.raw(key), key)

    def sections(self, key: str) -> list[Self]:
        """A list of objects; empty if the key is absent."""
        return [self._child(item, f"{key}[{i}]") for i, item in enumerate(self.items(key))]

    def refuse_rest(self) -> None:
        """Raises an error if the object has a key that was not read."""
        for key in sorted(self._values.keys() - self._read):
            self.refuse("unknown key", key, ", ".join(sorted(self._read)))

    def refuse(
        self,
        what: str,
        key: str,
        expected: str | None = None,
        hint: str | None = None,
        *,
        given: Collection[str] = (),
    ) -> None:
        """Raises the error about a key, or adds it to the problems.

        Args:
          what: the problem.
          key: the key; one error about each is enough.
          expected: what would be accepted.
          hint: what the user can do.
          given: paths of other keys that it follows from. If one of them was refused, this is no
            problem of its own.
        """
        self._add(self.error(what, key, expected, hint), key, given)

    def _add(self, error: MtjLoaderError, key: str, given: Collection[str] = ()) -> None:
        if not self._refused.isdisjoint({self._prefix + key, *given}):
            return
        self._refused.add(self._prefix + key)
        if self._problems is None:
            raise error
        self._problems.append(error)

    def error(
        self, what: str, key: str, expected: str | None = None, hint: str | None = None
    ) -> MtjLoaderError:
        """The error about a key and its value."""
        return self.error_class(
            what,
            file=self._file,
            key=shorten(self._prefix + self.spelling(key)),
            expected=expected,
            found=format_value(self._values.get(key)),
            hint=hint,
        )

    def _reject(
        self,
        key: str,
        expected: str,
        stand_in: _T,
        default: object = None,
        given: Collection[str] = (),
    ) -> _T:
        """Refuses a value; returns the legal one that replaces it."""
        missing = default is None and self._is_absent(key)
        what = "a required setting is missing" if missing else "not a legal value"
        self.refuse(what, key, expected, given=given)
        return stand_in

    def _child(self, value: object, name: str) -> Self:
        if not isinstance(value, Mapping):
            key, found = shorten(self._prefix + name), format_value(value)
            what = "not an object"
            error = self.error_class(what, file=self._file, key=key, expected="{…}", found=found)
            self._add(error, name)
            value = {}
        child = type(self)(value, self._file, f"{self._prefix}{name}.", self._problems)
        child._refused = self._refused
        return child

    def _is_absent(self, key: str) -> bool:
        return key not in self._values or (self._values[key] is None and self.null_is_absent)

    def _value(self, key: str, default: object = None) -> object:
        self._read.add(key)
        return default if self._is_absent(key) else self._values[key]


def format_value(value: object) -> str:
    """The value as JSON, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print the largest
        return f"a whole number of {value.bit_length()} bits"
    return shorten(json.dumps(value, default=str))


def shorten(text: str) -> str:
    """The text, cut after as many characters as a message shows."""
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


def _is_number(value: object, low: float) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return low <= value <= sys.float_info.max  # false for NaN, and for an int beyond any float
