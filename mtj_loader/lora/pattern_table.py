"""Values by patterns of module names, as in `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from mtj_loader.lora.patterns import (
    STEP_WORK,
    Matcher,
    UnsupportedPatternError,
    Work,
    compile_pattern,
)
from mtj_loader.names import dotted_ends

T = TypeVar("T")

_NAME = re.compile(r"(?:[\w-]|\\?\.){1,512}")  # a plain name, in which `.` is any character
_MAX_SHOWN_CHARS = 60  # of a pattern in a message


class PatternTable(Generic[T]):
    r"""Values by patterns; a pattern matches whole components at the end of a dotted name.

    As in PEFT's `get_pattern_key`, which matches `(.*\.)?(pattern)` with the whole name. Patterns
    that are plain names, of which an adapter may have thousands, are looked up in a dict.

    Args:
      values: pattern → value.

    Raises:
      UnsupportedPatternError: a pattern is malformed or not supported, or there are too many.
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = list(values.values())
        self.work = Work()
        # Length of the name → positions of `.` → the name → position in the table.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, Matcher]] = []
        for i, pattern in enumerate(values):
            self._add(pattern, i)

    def first_match(self, name: str, default: T) -> T:
        """The value of the first pattern that matches, or `default`.

        Raises:
          UnsupportedPatternError: the patterns take too long.
        """
        first = min(self._name_matches(name), default=len(self._values))
        others = (i for i, matcher in self._others if i < first and matcher.matches(name))
        first = next(others, first)
        return self._values[first] if first < len(self._values) else default

    def _add(self, pattern: str, i: int) -> None:
        if _NAME.fullmatch(pattern):
            name, wildcards = _split_name(pattern)
            self._names.setdefault(len(name), {}).setdefault(wildcards, {}).setdefault(name, i)
            return
        try:
            program = compile_pattern(pattern, self.work)  # alone: its groups must be its own
        except UnsupportedPatternError as error:
            raise UnsupportedPatternError(f"{pattern[:_MAX_SHOWN_CHARS]!r}: {error}") from error
        prefix = compile_pattern(r"(.*\.)?", self.work)
        self._others.append((i, Matcher(prefix + program, self.work)))

    def _name_matches(self, name: str) -> Iterator[int]:
        for end in dotted_ends(name):
            for wildcards, known in self._names.get(len(end), {}).items():
                self.work.spend(STEP_WORK * (len(wildcards) + 1))
                characters = list(end)
                for i in wildcards:
                    characters[i] = "."
                if (found := known.get("".join(characters))) is not None:
                    yield found


def _split_name(pattern: str) -> tuple[str, tuple[int, ...]]:
    """The name that a pattern spells, and the positions of its unescaped dots."""
    characters = re.findall(r"\\?.", pattern)
    wildcards = tuple(i for i, char in enumerate(characters) if char == ".")
    return pattern.replace("\\", ""), wildcards
